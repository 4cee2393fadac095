# just (https://just.systems; also `pip install rust-just`): the commands of daily work, in the README's environment.
# `just bin=/path/to/bin check` takes another one.

bin := ".venv/bin"
# two files of tests at a time; `just parallel="" test` for a debugger
parallel := "-n 2 --dist loadfile"

# what there is
_default:
    @{{just_executable()}} --list --unsorted

# lint, format and types, as in CI
check:
    {{bin}}/ruff check .
    {{bin}}/ruff format --check .
    {{bin}}/mypy

# the quick tests; arguments go to pytest
test *args:
    {{bin}}/python -m pytest {{parallel}} -m "not slow" {{args}}

# every test
test-all *args:
    {{bin}}/python -m pytest {{parallel}} {{args}}

# the documentation as a site, in site/ (needs the extra `docs`)
docs:
    {{bin}}/python -m mkdocs build --strict

# a training step, a layer and the loss beside others (arguments: scripts/bench.py --help)
bench *args:
    {{bin}}/python scripts/bench.py {{args}}
