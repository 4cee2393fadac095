"""A run as one static HTML file: what it was, how it went. Reads what a run left, and imports no Composer."""

from dbrx_train.train.page.record import read
from dbrx_train.train.page.render import render

__all__ = ["read", "render"]
