"""A run as one static HTML file: what it was, how it went. Reads what a run left, and imports no Composer."""

from dbrx_train.report.record import read
from dbrx_train.report.render import render

__all__ = ["read", "render"]
