"""The forecast inside a training run."""

from mergeprobe.live.callback import MergeProbeCallback
from mergeprobe.live.forecast import LiveForecast, PairForecast, forecast_run
from mergeprobe.live.others import read_against

__all__ = ["LiveForecast", "MergeProbeCallback", "PairForecast", "forecast_run", "read_against"]
