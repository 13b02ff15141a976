"""Device figures as Prometheus metrics: `pagoda top --prometheus` serves them over HTTP.

Counters are what the service counts, so rates are the business of whoever asks: for instance
`rate(pagoda_core_busy_seconds_total[1m])` is the load of each core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from pagoda.cli.device_load import Figures, tenant_of

_DEVICE = ("device",)
_PROCESS = ("device", "context", "pid", "user", "name")


class DeviceCollector:
    """A collector for a registry: looks at the services whenever somebody asks.

    look: figures by device; None for a service that does not answer.
    """

    def __init__(self, look: Callable[[], Mapping[str, Figures | None]]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        """Called by the registry: every metric, with a sample for each device or process."""
        found = self._look()
        up = GaugeMetricFamily("pagoda_up", "1 if the device's service answers.", labels=_DEVICE)
        for device, figures in found.items():
            up.add_metric([device], 0 if figures is None else 1)
        yield up
        devices = {name: figures for name, figures in found.items() if figures is not None}
        yield from _of_devices(devices)
        yield from _of_processes(devices)

    def registry(self) -> CollectorRegistry:
        """A registry of these metrics alone: the exporter's own would tell about itself."""
        registry = CollectorRegistry()
        registry.register(self)
        return registry


def _of_devices(devices: Mapping[str, Figures]) -> Iterable[Metric]:
    information = GaugeMetricFamily(
        "pagoda_device_info", "Always 1: chip and version as labels.",
        labels=(*_DEVICE, "chip", "version"),
    )  # fmt: skip
    for device, figures in devices.items():
        information.add_metric([device, figures["chip"]["name"], figures["pagoda"]], 1)
    yield information
    for name, meaning, value in (
        ("uptime_seconds", "Since the service was started.", lambda f: f["uptime_seconds"]),
        ("clock_hertz", "The chip's clock.", lambda f: f["chip"]["clock_hz"]),
        ("memory_bytes", "Device memory in use.", lambda f: f["memory_bytes"]),
        ("memory_total_bytes", "Device memory.", lambda f: f["memory_total_bytes"]),
        ("contexts", "Contexts that are open.", lambda f: len(f["contexts"])),
        ("queue_launches", "Launches that wait.",
         lambda f: sum(turn["turns"] for turn in f["queue"]["waiting"])),
        ("problems", "Problems of the service, such as a full disk.",
         lambda f: len(f["problems"])),
    ):  # fmt: skip
        gauge = GaugeMetricFamily(f"pagoda_{name}", meaning, labels=_DEVICE)
        for device, figures in devices.items():
            gauge.add_metric([device], value(figures))
        yield gauge
    for name, meaning in (
        ("launches", "Launches that have ended."),
        ("cycles", "Chip cycles of launches that have ended."),
        ("faults", "Launches that ended in a fault."),
        ("resets", "Resets of the device."),
    ):
        counter = CounterMetricFamily(f"pagoda_{name}", meaning, labels=_DEVICE)
        for device, figures in devices.items():
            counter.add_metric([device], figures[name])
        yield counter
    busy = CounterMetricFamily(
        "pagoda_core_busy_seconds", "Time in which a launch occupied the core.",
        labels=(*_DEVICE, "core"),
    )  # fmt: skip
    for device, figures in devices.items():
        for number, core in enumerate(figures["queue"]["cores"]):
            busy.add_metric([device, str(number)], core["busy_seconds"])
    yield busy


def _of_processes(devices: Mapping[str, Figures]) -> Iterable[Metric]:
    for name, meaning, family, source, key in (
        ("memory_bytes", "Device memory in use.", GaugeMetricFamily, "context", "memory_bytes"),
        ("memory_limit_bytes", "The most it may use.", GaugeMetricFamily, "context",
         "memory_limit_bytes"),
        ("launches", "Its launches.", CounterMetricFamily, "context", "launches"),
        ("cycles", "Chip cycles of its launches.", CounterMetricFamily, "context", "cycles"),
        ("faults", "Its faults.", CounterMetricFamily, "context", "faults"),
        ("core_seconds", "Time of its launches, times cores.", CounterMetricFamily, "tenant",
         "core_seconds"),
        ("waited_seconds", "Time for which its launches waited.", CounterMetricFamily, "tenant",
         "waited_seconds"),
    ):  # fmt: skip
        metric = family(f"pagoda_process_{name}", meaning, labels=_PROCESS)
        for device, figures in devices.items():
            for context in figures["contexts"]:
                account = context if source == "context" else tenant_of(figures, context)
                if account is not None:
                    labels = [device] + [str(context[label]) for label in _PROCESS[1:]]
                    metric.add_metric(labels, account[key])
        yield metric
