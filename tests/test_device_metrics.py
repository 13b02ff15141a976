"""The Prometheus metrics, read back by Prometheus' own parser."""

from device_figures import figures
from golden_text import check_golden
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pagoda.cli.device_metrics import DeviceCollector


def test_metrics_of_two_devices_of_which_one_is_gone():
    looks = {"default": figures(later=2.0), "gone": None}
    text = generate_latest(DeviceCollector(lambda: looks).registry()).decode()
    check_golden("metrics.txt", text)
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["pagoda_up", "default"] == 1 and samples["pagoda_up", "gone"] == 0
    assert samples["pagoda_core_busy_seconds_total", "2", "default"] == 51.0
    one = ("1", "812", "ann", "default", "one")
    assert samples["pagoda_process_core_seconds_total", *one] == 22.0
    assert samples["pagoda_process_cycles_total", *one] == 2e6
    assert samples["pagoda_queue_launches", "default"] == 3


def test_names_with_quotes_and_line_ends_survive():
    now = figures()
    now["contexts"][0]["name"] = 'a"b\\c\nd'
    text = generate_latest(DeviceCollector(lambda: {"default": now}).registry()).decode()
    names = {
        sample.labels.get("name")
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert 'a"b\\c\nd' in names
