"""The ``"fishdip"`` section of the DeepSpeed JSON."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from fishdip_ds.errors import ConfigError

STRATEGIES = ("fish_dip", "fish", "random", "full", "lora")


@dataclass(frozen=True, kw_only=True)
class FishdipConfig:
    """What to train and how to choose it. Counts of steps are optimizer steps, counted from 1."""

    strategy: str = "fish_dip"
    """fish_dip, fish (static Fisher of random samples), random (static); full and lora are stock baselines."""
    density: float = 0.01
    """Share of the eligible weights that is trained at a time, in (0, 1]; k = floor(density x eligible)."""
    refresh_interval: int = 100
    """A new mask before every step whose number is a multiple of this, and before step 1."""
    worst_samples: int | float = 25
    """How many of the worst samples feed the Fisher scores: a number, or a fraction of the training set."""
    fisher_samples: int = 1024
    """Strategy ``fish``: random samples of the one selection; capped at the training set."""
    sample_loss: str = "token_mean"
    """What ranks samples: token_mean, sum, or padded_mean (the reference code's)."""
    eligible: tuple[str, ...] = ("*",)
    """Globs over parameter names; a leading ``!`` excludes; the last match wins. Frozen ones never are."""
    scan_batch_size: int = 32
    """Samples per forward pass of the loss scan, on each rank. Fixed, so that losses do not depend on ranks."""
    select_mode_first: str = "eval"
    """Module mode of the first selection: eval, or train (dropout on)."""
    select_mode_refresh: str = "eval"
    """Module mode of later selections; the reference code leaves it at train."""
    worst_count_unit: str = "samples"
    """samples, or batches: the reference code's rule, a tenth of the number of batches within 3..25."""
    pad_as_target: bool = False
    """Reference quirk: pad every target to the limit and count pads as labels (task data only)."""
    lora_r: int = 16
    """Strategy ``lora``: rank of the adapters on all linear layers."""
    lora_alpha: int = 32
    """Strategy ``lora``: scale, divided by the rank."""
    seed: int = 42
    """Data order, selection's own random stream, random masks."""

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("sample_loss", self.sample_loss, ("token_mean", "sum", "padded_mean"))
        _one_of("worst_count_unit", self.worst_count_unit, ("samples", "batches"))
        for name in ("select_mode_first", "select_mode_refresh"):
            _one_of(name, getattr(self, name), ("eval", "train"))
        if not 0 < self.density <= 1:
            raise ConfigError(f'"fishdip.density" is {self.density}, but a share must lie in (0, 1]; '
                              "1 percent is 0.01.")
        for name in ("refresh_interval", "fisher_samples", "scan_batch_size", "lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ConfigError(f'"fishdip.{name}" is {getattr(self, name)}; it must be at least 1.')
        if self.worst_samples <= 0 or (isinstance(self.worst_samples, float) and self.worst_samples > 1):
            raise ConfigError(f'"fishdip.worst_samples" is {self.worst_samples}; give a whole number of samples '
                              "of at least 1, or a fraction of the training set in (0, 1].")

    @classmethod
    def from_dict(cls, section: dict) -> FishdipConfig:
        """Read a JSON section; ``"auto"`` takes the default. Unknown names and wrong types are refused."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values = {}
        for key, value in section.items():
            if key not in fields:
                raise ConfigError(f'unknown setting "fishdip.{key}"{nearest(key, fields)}')
            if value == "auto":
                continue
            if key == "eligible":
                value = (value,) if isinstance(value, str) else tuple(value)
            values[key] = _typed(key, value, cls.__annotations__[key])
        return cls(**values)

    def to_dict(self) -> dict:
        """JSON form of every setting."""
        return {**dataclasses.asdict(self), "eligible": list(self.eligible)}


def nearest(word: str, known) -> str:
    """``; did you mean "x"?`` for an error message, or the list of what is known."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else f"; known are {', '.join(sorted(known))}."


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f'"fishdip.{name}" is {value!r}{nearest(str(value), allowed)}')


_TYPES = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float), "int | float": (int, float),
          "tuple[str, ...]": (tuple,)}


def _typed(key: str, value: object, annotation: str) -> object:
    allowed = _TYPES[annotation]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ConfigError(f'"fishdip.{key}" is {value!r}; expected {annotation}.')
    return float(value) if annotation == "float" else value
