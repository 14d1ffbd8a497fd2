"""Any of diffusers' image autoencoders as a first stage: AutoencoderKL, AutoencoderDC, AutoencoderTiny, AutoencoderRAE.

What tells one latent space from another (the weights' hash, scale and shift) is recorded in the config of a checkpoint
and in the manifest of encoded latents, and whoever brings another autoencoder is refused.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dit_moe.autoencoders.base import FIRST_STAGES, FirstStage, Moments, Shape, from_uint8, to_uint8
from dit_moe.autoencoders.statistics import read_statistics, with_statistics
from dit_moe.config import ConfigError, Place, require
from dit_moe.downloads import may_be_repository, opening, require_allowed
from dit_moe.extras import how_to_install
from dit_moe.files import require_no_stand_in

BUNDLED = {"digits": Path(__file__).parent / "weights" / "digits"}  # `dit-moe train-autoencoder` made them
KINDS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "AutoencoderRAE")
IDENTITY = ("kind", "channels", "sha256")  # the fields that tell an autoencoder from others
FROM_ZERO = ("AutoencoderRAE",)  # takes and gives pixels in [0, 1], all others in [−1, 1]


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """A diffusers autoencoder. The fields marked (recorded) are filled in from it, or from the latents' manifest."""

    model: Annotated[str, Place(tuple(BUNDLED))]  # a folder in diffusers' layout, a name on the Hub, or a bundled one
    subfolder: str | None = None  # where it is within that, for instance vae
    normalization: Literal["model", "statistics"] = "model"  # its own scale and shift, or the latents' mean and std
    statistics: Annotated[str, Place()] | None = None  # a file of these; None: those measured by `dit-moe encode`
    precision: Literal["fp32", "bf16"] = "fp32"
    tiling: bool = False  # encode and decode large images tile by tile: less memory, other pixels near the seams
    slicing: bool = False  # one image at a time: less memory
    kind: str | None = None  # (recorded) its class in diffusers
    channels: int | None = None  # (recorded) of the latents
    sha256: str | None = None  # (recorded) of its weights in fp32
    shift: tuple[float, ...] | None = None  # (recorded) latents are (raw − shift) · scale, per channel or one for all
    scale: tuple[float, ...] | None = None  # (recorded)
    statistics_sha256: str | None = None  # (recorded) of those of each place, which shift and scale do not hold

    def __post_init__(self) -> None:
        require(self.kind is None or self.kind in KINDS, self, "kind", f"must be one of {', '.join(KINDS)}")
        both = (self.shift is None) == (self.scale is None)
        require(both, self, "shift", f"and scale={self.scale} belong together; give both or none")
        for field in ("shift", "scale"):
            given = getattr(self, field)
            width = 1 if given is None else len(given)
            wanted = f"needs one number, or one for each of the channels={self.channels}"
            require(width == 1 or (width > 1 and self.channels in (None, width)), self, field, wanted)
            require(all(map(math.isfinite, given or ())), self, field, "must hold finite numbers")
        require(0 not in (self.scale or ()), self, "scale", "must not be 0")
        chosen = self.statistics is None or self.normalization == "statistics"
        require(chosen, self, "statistics", f"needs normalization=statistics, not {self.normalization}; set that")
        alone = self.statistics is None or self.scale is None
        require(alone, self, "statistics", f"and scale={self.scale} contradict each other; drop shift and scale")

    def describe(self) -> str:
        """The latent space in words, whatever the place of the autoencoder."""
        weights = (self.sha256 or "unknown")[:12]
        network = f"{self.kind} with weights {weights}, {self.channels} channels"
        if self.statistics is not None:
            return f"{network}, statistics of each place {(self.statistics_sha256 or 'unknown')[:12]}"
        shift, scale = (", ".join(f"{value:.5g}" for value in each or ()) for each in (self.shift, self.scale))
        return f"{network}, shift {shift}, scale {scale}"

    def same_space(self, other: object) -> bool:
        """Whether latents mean the same for both configs, where one was never loaded as far as it is recorded."""
        fields = (*IDENTITY, "shift", "scale", "statistics_sha256")
        pairs = [(getattr(self, field), getattr(other, field, None)) for field in fields]
        if None in (self.sha256, getattr(other, "sha256", None)):
            pairs = [pair for pair in pairs if None not in pair]
        return isinstance(other, type(self)) and all(mine == theirs for mine, theirs in pairs)

    def contradicts(self, found: AutoencoderConfig) -> bool:
        """Whether what this config says of the autoencoder, as far as it does, is untrue of the resolved `found`."""
        return any(getattr(self, f) not in (None, getattr(found, f)) for f in IDENTITY)


@FIRST_STAGES.register("autoencoder", AutoencoderConfig)
class Autoencoder(FirstStage):
    """Loads its network from safetensors when it is first needed; training on encoded latents never needs it.

    Raises:
        ConfigError: there is no such autoencoder, or it is another one than the config's recorded one.
    """

    _device: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.network: Any = None
        self.register_buffer("_device", torch.empty(0), persistent=False)  # where .to() has put this module

    def latent_shape(self, image_shape: Shape) -> Shape:
        """Found by a run of the architecture without weights or numbers, which needs no more than its config.json."""
        network = _build_empty(self.config)
        wanted = network.config.get("in_channels", 3)
        if image_shape[0] != wanted:
            raise _refusal(self.config, f"takes images of {wanted} channels, the data has {image_shape[0]}")
        try:
            latents = _moments(network, torch.empty(1, *image_shape, device="meta")).mean
            decoded = network.decode(latents, return_dict=False)[0]
            if tuple(decoded.shape[1:]) != tuple(image_shape):
                raise ValueError(f"would come back as {_shown(decoded.shape[1:])}")
        except (RuntimeError, ValueError) as error:
            found = f"{_shown(image_shape)}: {str(error).splitlines()[0]}"
            raise _refusal(self.config, f"cannot take images of {found}; choose another image size") from None
        channels, height, width = latents.shape[1:]
        return channels, height, width

    def encode(self, images_BCHW: Tensor) -> Moments:
        return self.normalize(self.encode_raw(images_BCHW))

    @torch.no_grad()
    def encode_raw(self, images_BCHW: Tensor) -> Moments:
        """Moments as the network makes them, float32: what shards keep, whatever normalisation training chooses."""
        network, pixels = self._ready(), from_uint8(images_BCHW)
        with self._autocast():
            mean, std = _moments(network, (pixels + 1) / 2 if self._from_zero else pixels)
        return Moments(mean.float(), None if std is None else std.float())

    def normalize(self, moments: Moments) -> Moments:
        shift, scale = self._affine(moments.mean.device)
        return Moments((moments.mean - shift) * scale, None if moments.std is None else moments.std * scale.abs())

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        network, (shift, scale) = self._ready(), self._affine(latents_BCHW.device)
        with self._autocast():
            raw_BCHW = (latents_BCHW.float() / scale + shift).to(network.dtype)
            pixels = network.decode(raw_BCHW, return_dict=False)[0].float()
        return to_uint8(2 * pixels - 1 if self._from_zero else pixels)

    def load(self) -> None:
        self._ready()

    def resolved(self) -> AutoencoderConfig:
        """Raises ConfigError for ``normalization: statistics``, which only encoded latents know."""
        self._ready()
        return self.config

    # ----------------------------------------------------------------------------------------------------- the network

    def _ready(self) -> Any:
        if self.network is None:
            network = _load(self.config)
            self.config = self._recorded(network)
            self.network = network.to(self._device.device).eval().requires_grad_(False)
        return self.network

    def _recorded(self, network: Any) -> AutoencoderConfig:
        """The config with what the network turned out to be; ConfigError if that is not what was recorded before."""
        config = with_statistics(self.config)
        try:
            shift, scale = normalization_of(network.config)
        except (TypeError, ValueError, ZeroDivisionError):
            wanted = "scaling_factor, shift_factor, latents_mean and latents_std must be numbers, and spreads above 0"
            raise _refusal(config, f"has a config.json that cannot be right: {wanted}; get it anew") from None
        found = replace(
            config,
            kind=type(network).__name__,
            channels=int(network.config.get("latent_channels") or network.config.encoder_hidden_size),
            sha256=hash_of(network),
            shift=config.shift or (shift if config.statistics is None else None),
            scale=config.scale or (scale if config.statistics is None else None),
        )
        if config.contradicts(found):
            problem = f" is an {found.describe()}; these latents are of an {config.describe()}; use that autoencoder"
            raise ConfigError(f"first_stage.model={config.model}", problem)
        if config.normalization == "statistics" and config.scale is None and config.statistics is None:
            wanted = (
                "needs latents encoded by `dit-moe encode`, which measures them; or give a file, or shift and scale"
            )
            raise ConfigError("first_stage.normalization", f"=statistics {wanted}")
        return found

    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Shift and scale, [C or 1, 1, 1] or [C, H, W]."""
        if self._places is not None:
            mean, std = self._places
            return mean.to(device), 1 / std.to(device)
        if self.config.scale is None:
            self._ready()
        given = self.config.shift, self.config.scale
        shift, scale = (torch.tensor(each, device=device).view(-1, 1, 1) for each in given)
        return shift, scale

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor] | None:
        """Mean and std of each place."""
        self.config = with_statistics(self.config)
        return None if self.config.statistics is None else read_statistics(self.config.statistics)

    @property
    def _from_zero(self) -> bool:
        return self.config.kind in FROM_ZERO

    def _autocast(self) -> torch.autocast:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self._device.device.type, dtype=torch.bfloat16, enabled=bf16)


def normalization_of(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale that an autoencoder's own config asks for: latents are (raw − shift) · scale."""
    if config.get("_class_name") in FROM_ZERO:
        return (0.0,), (1.0,)  # it normalises inside
    factor = config.get("scaling_factor")
    factor = 1.0 if factor is None else float(factor)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return tuple(map(float, mean)), tuple(factor / float(each) for each in std)
    return (float(config.get("shift_factor") or 0.0),), (factor,)


def hash_of(network: nn.Module) -> str:
    """sha256 of all weights by name, in fp32: the same however they are cut into files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


def _moments(network: Any, pixels_BCHW: Tensor) -> Moments:
    """Each kind calls its answer something else: a distribution, or the latents themselves."""
    answer = network.encode(pixels_BCHW, return_dict=False)[0]
    return Moments(answer) if isinstance(answer, Tensor) else Moments(answer.mean, answer.std)


def _refusal(config: AutoencoderConfig, problem: str) -> ConfigError:
    return ConfigError("first_stage.model", f"={config.model} {problem}")


def place_of(config: AutoencoderConfig) -> str:
    """The folder, as an absolute path, or the name on the Hub, to load from."""
    place = str(BUNDLED.get(config.model, config.model))
    return os.path.abspath(place) if os.path.isdir(place) else place


def _require_allowed(config: AutoencoderConfig) -> None:
    """NotDownloaded for an autoencoder that is to come from the Hub, where nothing may be downloaded."""
    place = place_of(config)
    if not os.path.isdir(place) and may_be_repository(place):
        problem, remedy = f"={config.model} is no folder", "name a folder in diffusers' layout"
        require_allowed("first_stage.model", problem, "diffusers", "the Hugging Face Hub", remedy)


def _class_and_config(config: AutoencoderConfig) -> tuple[Any, dict[str, Any]]:
    """The diffusers class that config.json names, and what else that says."""
    import diffusers

    try:
        with opening(place_of(config)):
            raw = diffusers.AutoencoderKL.load_config(place_of(config), subfolder=config.subfolder)
        kind = raw.get("_class_name")
    except Exception as error:  # of many kinds, from diffusers
        _require_allowed(config)
        hint = f"name a folder with config.json, a model on the Hub, or one of: {', '.join(BUNDLED)}"
        raise _refusal(config, f"has no readable config.json ({_first_line(error)}); {hint}") from None
    if kind not in KINDS:
        raise _refusal(config, f"is a {kind}; supported are {', '.join(KINDS)}; see also first_stage.subfolder")
    return getattr(diffusers, kind), raw


@contextmanager
def _packages_of(config: AutoencoderConfig) -> Iterator[None]:
    """AutoencoderRAE is built of a network of transformers, which diffusers does not ask for."""
    try:
        yield
    except (ImportError, NameError) as error:
        problem = f"needs a package that is not installed ({error}); {how_to_install('transformers')}"
        raise _refusal(config, problem) from None


def _build_empty(config: AutoencoderConfig) -> Any:
    cls, raw = _class_and_config(config)
    try:
        with _packages_of(config), torch.device("meta"):
            return cls.from_config(raw).eval()
    except ConfigError:
        raise
    except Exception as error:  # of many kinds, from diffusers
        problem = f"has a config.json of no {cls.__name__} ({_first_line(error)})"
        raise _refusal(config, f"{problem}; get it anew") from None


def _require_floats(config: AutoencoderConfig, folder: Path) -> None:
    """ConfigError for what diffusers would take for weights in a folder: whole numbers, or a pointer of Git LFS."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            require_no_stand_in(path)
        except ValueError as error:
            raise ConfigError("first_stage.model", f"={config.model}: {error}") from None
        with suppress(SafetensorError), safe_open(path, "pt") as file:  # what cannot be read is told where it is loaded
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                tensor = file.get_slice(name)
                if tensor.get_shape() and "F" not in tensor.get_dtype():  # F32, F16, BF16, F8_E4M3, …
                    problem = f": {path.name} holds {tensor.get_dtype()} for {name}, which are no weights"
                    raise ConfigError("first_stage.model", f"={config.model}{problem}; get it anew")


def _load(config: AutoencoderConfig) -> Any:
    (cls, _), place = _class_and_config(config), place_of(config)
    _require_floats(config, Path(place, config.subfolder or ""))
    options = {"use_safetensors": True, "torch_dtype": torch.float32, "output_loading_info": True}
    with _packages_of(config):
        try:
            with opening(place):
                network, info = cls.from_pretrained(place, subfolder=config.subfolder, **options)
        except (ImportError, NameError):
            raise
        except Exception as error:  # of many kinds, from diffusers
            _require_allowed(config)
            reason = " ".join(str(error).split())[:300]
            raise _refusal(config, f"has no readable safetensors weights: {reason}") from None
    misfits = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if misfits:  # diffusers would go on with random numbers in their place
        raise _refusal(config, f"has weights that do not fit its config.json ({misfits[0]}, …); get it anew")
    for switch in [name for name in ("tiling", "slicing") if getattr(config, name)]:
        try:
            getattr(network, f"enable_{switch}")()
        except (AttributeError, NotImplementedError):
            raise ConfigError(f"first_stage.{switch}", f"=True: a {cls.__name__} has none; drop the line") from None
    return network


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _shown(shape: Any) -> str:
    return "×".join(map(str, shape))
