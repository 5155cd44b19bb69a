"""The plugin: what Axolotl calls, from the configuration to the saved model.

Axolotl calls every plugin that was loaded in the process, also for a configuration that does not name it; so each hook
asks the configuration first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

from safe_sched.errors import DataError, ModelError, OptionError
from safe_sched.training.record import seal
from safe_sched_axolotl.block import ADD_PLUGIN, KEY, PLUGIN, named_in, plain, require_block
from safe_sched_axolotl.mixing import mix_datasets, refuse_prior, refuse_unmixable, source_of
from safe_sched_axolotl.safety import safety_rows
from safe_sched_axolotl.weights import refuse_weights, weighted_rows
from safe_sched_hf.callback import SafeSchedCallback

UNSUPPORTED = {
    "rl": "preference and reinforcement learning",
    "reward_model": "reward models",
    "process_reward_model": "process reward models",
    "use_eaft": "a loss of its own",
    "orpo_alpha": "a loss of its own",
    "relora": "ReLoRA",
    "use_ray": "Ray",
    "deepspeed": "DeepSpeed",
    "torch_compile": "compiled models",
    "auto_find_batch_size": "a batch size that is found by trial",
}
"""Keys of a configuration whose training is not supervised fine-tuning as the callback knows it."""

PARALLEL = (
    "tensor_parallel_size",
    "context_parallel_size",
    "sequence_parallel_degree",
    "expert_parallel_size",
)
"""Keys that share rows, or parts of one, between processes, where they are above 1."""


class Hooks:
    """Scales the gradient of every row, as the block ``safe_sched:`` of the configuration says.

    `plugin_class` joins these methods with Axolotl's base class.
    """

    def __init__(self) -> None:
        super().__init__()
        self._source: dict[str, Any] | None = None
        self._trained = False

    def register(self, cfg: Any) -> None:
        """The configuration as it was read, before Axolotl checks it.

        Raises:
            OptionError: The block is missing, or is not what is allowed; or it is there and the plugin is not named.
            ModelError: What is to be trained is not supported.
        """
        self._source, self._trained = None, False
        if not named_in(cfg):
            if cfg.get(KEY) is not None:
                raise OptionError(f"there is a {KEY!r} block, and plugins: does not name {PLUGIN}; {ADD_PLUGIN}")
            return
        settings = require_block(cfg)
        settings.callback()  # options that do not go together, before a model is loaded
        refuse(cfg)
        refuse_unmixable(settings, cfg)
        refuse_prior(settings, cfg)
        refuse_weights(settings, cfg)

    def get_input_args(self) -> str:
        """Where the class with the key is."""
        return "safe_sched_axolotl.args.SafeSchedArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Mix what is to be mixed. Axolotl goes on to load the data sets itself."""
        if not named_in(cfg):
            return
        if not preprocess and _first_process():
            with contextlib.suppress(DataError):  # it is for the manifest; what Axolotl cannot load, it says itself
                self._source = source_of(cfg)
        mix_datasets(require_block(cfg), cfg)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The callback that does what the block says, with the safety set read as Axolotl reads data."""
        if not named_in(cfg):
            return []
        settings = require_block(cfg)
        callback = settings.callback(safety_rows(settings.safety_data, cfg, trainer.processing_class))
        callback.rows = functools.partial(weighted_rows, cfg, trainer.processing_class)
        if self._source is not None:
            told: dict[str, Any] = {"front_end": f"axolotl {importlib.metadata.version('axolotl')}"}
            if settings.mix is not None:
                told["mix"] = settings.mix.model_dump(by_alias=True, exclude={"safety_data"})
            callback.source = told | self._source
        return [callback]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Make sure that the trainer has the callback: whoever built it may not have asked for it."""
        if named_in(cfg) and not any(isinstance(c, SafeSchedCallback) for c in trainer.callback_handler.callbacks):
            raise ModelError(
                f"{type(trainer).__name__} was made without the plugins' callbacks, so it would train undefended. "
                "Remove trainer_cls and the plugins that bring a trainer of their own."
            )

    def post_train(self, cfg: Any, model: Any) -> None:
        """Called when training has ended and, again, when the model has been saved: then note what was saved."""
        if not named_in(cfg):
            return
        if self._trained and _first_process():
            seal(cfg.output_dir)
        self._trained = not self._trained


def refuse(config: Any) -> None:
    """Stop where the configuration asks for a training that cannot be defended.

    Raises:
        ModelError: Naming the key.
    """
    for key, what in UNSUPPORTED.items():
        if config.get(key):
            raise ModelError(f"{key}: {plain(config[key])!r}: safe-sched does not support {what} here; remove {key}")
    for key in PARALLEL:
        if config.get(key) not in (None, 0, 1):
            raise ModelError(f"{key}: {plain(config[key])!r}: safe-sched does not support it; allowed: 1, or remove it")
    fsdp = config.get("fsdp_config") or {}
    if fsdp or config.get("fsdp"):
        version = config.get("fsdp_version") or (isinstance(fsdp, Mapping) and fsdp.get("fsdp_version"))
        if str(version) != "2":
            raise ModelError(
                f"fsdp_version: {version or None!r}: safe-sched does not support FSDP of the first version; "
                "set fsdp_version: 2"
            )


@functools.cache
def plugin_class() -> type:
    """The class that ``plugins:`` names. Axolotl is imported here, and nowhere at import."""
    from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]

    return type("SafeSchedPlugin", (Hooks, BasePlugin), {"__doc__": Hooks.__doc__, "__module__": "safe_sched_axolotl"})


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
