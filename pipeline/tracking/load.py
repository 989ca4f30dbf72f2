"""The machine's load, as MLflow measures it."""

from collections.abc import Iterator
from threading import Event
from typing import Any

INTERVAL = 10.0  # seconds between two samples; MLflow's variables of the environment override


def sample_load(ended: Event) -> Iterator[dict[str, float]]:
    """From time to time the load since the last time, by metric, until `ended` is set."""
    from mlflow import environment_variables
    from mlflow.system_metrics import system_metrics_monitor

    untyped: Any = system_metrics_monitor
    variables: Any = environment_variables
    monitors = [untyped.CPUMonitor(), untyped.DiskMonitor(), untyped.NetworkMonitor()]
    if gpu := untyped.SystemMetricsMonitor._initialize_gpu_monitor(None):
        monitors.append(gpu)
    interval = variables.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or INTERVAL
    count = variables.MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING.get() or 1
    while True:
        for _ in range(count):
            for monitor in monitors:
                monitor.collect_metrics()
            if ended.wait(interval):
                return
        yield {
            f"system/{name}": value
            for monitor in monitors
            for name, value in monitor.aggregate_metrics().items()
        }
        for monitor in monitors:
            monitor.clear_metrics()
