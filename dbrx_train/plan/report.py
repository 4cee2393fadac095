"""The answer of ``dbrx-train plan``."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress

from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.plan.planner import Plan, count, kind, plan
from dbrx_train.plan.search import nearest, search
from dbrx_train.plan.table import as_dict, ranking, render

__all__ = ["report"]


def report(config: RunConfig, *, as_json: bool = False, searching: bool = False) -> None:
    """Print the plan of ``config``, or with ``searching`` the ranking of all that fit.

    Raises:
        ConfigError: it is impossible, or does not fit; the line names what is nearest and does.
    """
    if searching:
        _print_ranking(config, as_json)
        return
    found = plan(config)
    misfit = None if found.fits else _misfit(found)
    print(json.dumps(as_dict(found), indent=2) if as_json else render(found, misfit))
    if misfit:
        raise ConfigError(misfit)


def _print_ranking(config: RunConfig, as_json: bool) -> None:
    gpus, card = count(config), kind(config)
    found = search(config, gpus)
    if not found:
        raise ConfigError(f"no mesh fits {gpus} x {card.name}; {nearest(config, gpus)}")
    if as_json:
        print(json.dumps([as_dict(each) for each in found], indent=2))
        return
    print(ranking(config, found))
    with suppress(ConfigError), warnings.catch_warnings():  # it may divide over another number of GPUs
        warnings.simplefilter("ignore")
        asked = plan(config, gpus)
        size = f"{asked.held.total / 1e9:.1f} GB{'' if asked.fits else ', which does not fit'}"
        print(f"as configured: {asked.step.total:.3g} s, {size}; limit: {asked.limit}")


def _misfit(found: Plan) -> str:
    holds, room = found.held.total / 1e9, found.room / 1e9
    return (
        f"a rank would hold {holds:.1f} GB, and {found.gpu.name} has room for {room:.1f}; "
        f"{nearest(found.config, found.gpus)}"
    )
