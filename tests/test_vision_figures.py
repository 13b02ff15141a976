"""The figures of `pagoda bench resnet50`, on networks small enough for every day."""

import json

import pytest
import torch
from click.testing import CliRunner

from pagoda.cli.bench_resnet50 import enlarged, resnet50
from pagoda.isa.chip import PRESETS
from pagoda.pytorch import device, vision_figures
from pagoda.pytorch.vision import MobileNet, ResNet


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    def small_resnet():
        return ResNet(((1, 16, 1), (1, 16, 2)), 10)

    def small_mobilenet():
        return MobileNet(((1, 16, 1, 1), (2, 16, 1, 2)), 32, 10)

    networks = {"resnet50": small_resnet, "mobilenet_v2": small_mobilenet}
    before = (device.state.executor, device.state.allocator)
    monkeypatch.setattr(vision_figures, "NETWORKS", networks)
    yield
    device.state.executor, device.state.allocator = before


def test_macs_of_the_papers():
    """4.09 and 0.30 thousand million, the figures quoted for these networks."""
    with torch.device("meta"):
        images = torch.empty(1, 3, 224, 224)
        assert vision_figures.count_macs(ResNet(), images) == (4_089_184_256, 0)
        total, depthwise = vision_figures.count_macs(MobileNet(), images)
    assert (total, depthwise) == (280_057_856, 20_716_416)


def test_benchmark():
    arguments = ["--batch", "1", "--size", "32", "--layers", "--json"]
    result = CliRunner().invoke(resnet50, arguments, catch_exceptions=False)
    row = json.loads(result.stdout.splitlines()[-1])
    assert row["scaling_64"] == min(row[dtype]["scaling_64"] for dtype in ("int8", "bf16"))
    for dtype in ("int8", "bf16"):
        figures = row[dtype]
        assert 0 < figures["utilisation"] < 1 and figures["scaling_64"] > 1
        assert figures["utilisation"] == pytest.approx(
            figures["macs"] / 256 / figures["cycles"], abs=1e-4
        )
        mobile = figures["mobilenet_v2"]
        assert 0 < mobile["depthwise_cycles"] < mobile["cycles"]
        assert 0 < mobile["depthwise_lane_utilisation"] < 1
    assert "convolution_depthwise" not in result.stdout and "kernel (origin)" in result.stdout


def test_larger_chip():
    edge = PRESETS["edge"]
    large = enlarged(edge)
    assert (large.rows, large.cols, large.lanes, large.cores) == (64, 64, 64, 1)
    assert large.sram_bytes == 4 * edge.sram_bytes and large.acc_bytes == 4 * edge.acc_bytes
    assert large.dram_bytes_per_cycle == 16 * edge.dram_bytes_per_cycle
    assert enlarged(PRESETS["car"]) is None
