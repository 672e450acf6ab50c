"""The command, or the few lines of Python, that repeat a run."""

import inspect
import json
import shlex
from typing import Any

from .. import _core
from .._core import Policy
from ..finetune import FROZEN
from .inputs import RunFolder

BOOKKEEPING = ("compute_dtype", "eval_every", "save_every", "telemetry_every")
"""Options that a command may leave out: the type was chosen by the machine, the others change no number."""
RATES = ("learning_rate", "scale_learning_rate", "final_learning_rate")
"""Options whose defaults depend on the policy."""
POLICY_FILE = "policy.json"


def policy_name(policy: Policy) -> str:
    """The preset of that content, as it is or as a run trains it, or "" for a user's own."""
    presets = {name: Policy.preset(name) for name in Policy.presets()}
    return next(
        (name for name, preset in presets.items() if policy in (preset, _core.recommended(preset).policy)),
        "",
    )


def _recipe(run: RunFolder) -> _core.Recipe:
    """What a command that names the policy would do by itself."""
    name = policy_name(run.policy)
    return _core.recommended(Policy.preset(name) if name else run.policy)


def command_of(run: RunFolder) -> str:
    """`libqat finetune ...` where its options can say it, else Python. An own policy is `policy.json`."""
    return _command_line(run) or _python(run)


def _changed(run: RunFolder) -> dict[str, Any]:
    """The options that differ from the defaults of the command line."""
    recipe = _recipe(run)
    defaults = _core.default_options() | {"frozen": list(FROZEN)}
    if run.start == recipe.start:
        defaults |= {name: getattr(recipe, name) for name in RATES}
    start = {} if run.start == recipe.start else {"start": run.start}
    return start | {
        name: value
        for name, value in run.options.items()
        if value != defaults.get(name) and name not in BOOKKEEPING
    }


def _command_line(run: RunFolder) -> str:
    from ..cli import finetune

    if run.source is None or not run.texts:
        return ""
    known = inspect.signature(finetune.run).parameters
    options = [("text", text) for text in run.texts]
    options += [("control",)] if run.control else [("policy", policy_name(run.policy) or POLICY_FILE)]
    for name, value in _changed(run).items():
        if name == "objective":
            value = next(
                (word.value for word, weights in finetune.WEIGHTS.items() if _same(weights, value)), None
            )
        if name not in known or value is None or value == []:
            return ""
        options += [(name, one) for one in (value if isinstance(value, list) else [value])]
    lines = [["libqat", "finetune", str(run.source)]]
    lines += [
        [f"--{name.replace('_', '-')}", *map(str, value)] for name, *value in [*options, ("out", "run")]
    ]
    return " \\\n  ".join(map(shlex.join, lines))


def _same(weights: dict[str, float], objective: dict[str, float]) -> bool:
    return objective == _core.default_options()["objective"] | weights


def _python(run: RunFolder) -> str:
    source = repr(str(run.source)) if run.source else "SOURCE"
    if run.texts:
        length = run.options["sequence_length"]
        tokens = f"finetune.tokenize_files({source}, {run.texts!r}, {length})"
    else:
        tokens = "TOKENS  # the run was given token ids, int64[n], and does not know their text"
    policy = "finetune.FLOAT" if run.control else repr(policy_name(run.policy) or POLICY_FILE)
    options = _changed(run) | {"frozen": run.options["frozen"]}
    lines = ["from libqat import finetune", "", f"tokens = {tokens}"]
    lines += ["finetune.start(", f"    {source}, tokens, {policy}, 'run',"]
    lines += [f"    {name}={value!r}," for name, value in sorted(options.items())]
    return "\n".join([*lines, ").train()"])


def policy_text(policy: Policy) -> str:
    """Indented JSON."""
    return json.dumps(json.loads(policy.to_json()), indent=2, ensure_ascii=False)
