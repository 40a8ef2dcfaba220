"""The figures: each takes numbers and returns a plotly figure, writing nothing."""

from moesim.report.breakdown_figures import breakdown_figure
from moesim.report.memory_figures import memory_figure
from moesim.report.scaling_figures import scaling_figure

__all__ = ["breakdown_figure", "memory_figure", "scaling_figure"]
