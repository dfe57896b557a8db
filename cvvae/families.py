"""The families of video VAEs: where a new model is added.

A family is a module tree with its key names. Its module states the spec's subclass, the named literals, how to build
the model, and how a checkpoint of it is recognised; this file joins them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor

from cvvae import cv_vae_checkpoint, diffusers_config, iv_vae_checkpoint, od_vae_checkpoint, open_sora_checkpoint
from cvvae.cv_vae import CVVAE, CVVAE_SPECS, CVVAESpec
from cvvae.diffusers_cogvideox import COGVIDEOX_SPECS, CogVideoXVAE
from cvvae.diffusers_hunyuan import HUNYUAN_15_SPECS, HUNYUAN_SPECS, HunyuanVideo15VAE, HunyuanVideoVAE
from cvvae.diffusers_image_vae import IMAGE_KL_SPECS, SVD_SPECS, SVDVAE, ImageKLVAE, with_new_attention_keys
from cvvae.diffusers_ltx import LTX2_SPECS, LTX_SPECS, LTXVAE
from cvvae.diffusers_mochi import MOCHI_SPECS, MochiVAE
from cvvae.diffusers_vae import DiffusersSpec
from cvvae.diffusers_wan import WAN_SPECS, WanVAE
from cvvae.iv_vae import IVVAE, IVVAE_SPECS, IVVAESpec
from cvvae.od_vae import ODVAE, ODVAE_SPECS, ODVAESpec
from cvvae.open_sora_vae import OPEN_SORA_SPECS, OpenSoraSpec, OpenSoraVAE
from cvvae.spec import VAESpec
from cvvae.vae import VideoVAE


def _config_says_all(spec: VAESpec, tensors: Mapping[str, Tensor], *, where: str) -> VAESpec:
    return spec


def _as_they_are(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


def _no_constants(spec: VAESpec) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What this package must know of a family. `where` names the file in error messages (ValueError)."""

    spec_type: type[VAESpec]
    build: Callable[[Any], VideoVAE]
    """A model of a spec, weights not set: may run under torch.device("meta")."""
    class_names: tuple[str, ...]
    """What `_class_name` (diffusers) or `model_type` (transformers) in config.json may be."""
    spec_from_config: Callable[..., VAESpec]
    """(config, *, where) -> spec"""
    config_from_spec: Callable[[Any], dict[str, Any]]
    """What `spec_from_config` reads back."""
    recognises: Callable[[Mapping[str, Tensor]], bool]
    """Whether a state dict without a config has this family's keys."""
    spec_from_tensors: Callable[..., VAESpec]
    """(tensors, *, where) -> spec: sizes from shapes, the rest is the family's own."""
    spec_with_tensors: Callable[..., VAESpec] = _config_says_all
    """(spec of the config, tensors, *, where) -> spec, where a config leaves something to the tensors."""
    constants: Callable[[Any], dict[str, Tensor]] = _no_constants
    """Tensors of a checkpoint that are no weights but facts of the spec; the model does not have them."""
    with_known_keys: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = _as_they_are
    """A checkpoint's tensors under the keys of today, where there are older ones."""
    weights_name: str = "diffusion_pytorch_model.safetensors"
    """The weight file beside config.json, as the authors name it."""


_CVVAE = Family(
    spec_type=CVVAESpec,
    build=CVVAE,
    class_names=tuple(cv_vae_checkpoint.CLASS_NAMES),
    spec_from_config=cv_vae_checkpoint.spec_from_config,
    config_from_spec=cv_vae_checkpoint.config_from_spec,
    recognises=cv_vae_checkpoint.recognises,
    spec_from_tensors=cv_vae_checkpoint.spec_from_tensors,
)

_IVVAE = Family(
    spec_type=IVVAESpec,
    build=IVVAE,
    class_names=(iv_vae_checkpoint.CLASS_NAME,),
    spec_from_config=iv_vae_checkpoint.spec_from_config,
    config_from_spec=iv_vae_checkpoint.config_from_spec,
    recognises=iv_vae_checkpoint.recognises,
    spec_from_tensors=iv_vae_checkpoint.spec_from_tensors,
)

_ODVAE = Family(
    spec_type=ODVAESpec,
    build=ODVAE,
    class_names=(od_vae_checkpoint.CLASS_NAME,),
    spec_from_config=od_vae_checkpoint.spec_from_config,
    config_from_spec=od_vae_checkpoint.config_from_spec,
    recognises=od_vae_checkpoint.recognises,
    spec_from_tensors=od_vae_checkpoint.spec_from_tensors,
)

_OPEN_SORA = Family(
    spec_type=OpenSoraSpec,
    build=OpenSoraVAE,
    class_names=(open_sora_checkpoint.CLASS_NAME,),
    spec_from_config=open_sora_checkpoint.spec_from_config,
    config_from_spec=open_sora_checkpoint.config_from_spec,
    recognises=open_sora_checkpoint.recognises,
    spec_from_tensors=open_sora_checkpoint.spec_from_tensors,
    spec_with_tensors=open_sora_checkpoint.spec_with_tensors,
    constants=open_sora_checkpoint.constants,
    weights_name=open_sora_checkpoint.WEIGHTS_NAME,
)


def _needs_config(tensors: Mapping[str, Tensor]) -> bool:
    """Keys and shapes of diffusers' VAEs leave their scale open: without a config.json they are nobody's."""
    return False


def _no_spec(tensors: Mapping[str, Tensor], *, where: str) -> VAESpec:
    raise ValueError(f"{where}: expected a folder with the config.json of diffusers, got tensors alone")


def _of_diffusers(build: Callable[[Any], VideoVAE], specs: Mapping[str, DiffusersSpec], **hooks: Any) -> Family:
    known = tuple(specs.values())
    if known[0].peer.statistics_in_weights:
        hooks |= {
            "spec_with_tensors": diffusers_config.spec_with_latent_statistics,
            "constants": diffusers_config.latent_statistics,
        }
    return Family(
        spec_type=type(known[0]),
        build=build,
        class_names=(known[0].peer.name,),
        spec_from_config=partial(diffusers_config.spec_from_config, known=known),
        config_from_spec=partial(diffusers_config.config_from_spec, known=known),
        recognises=_needs_config,
        spec_from_tensors=_no_spec,
        **hooks,
    )


FAMILIES: dict[str, Family] = {
    "cvvae-sd21": _CVVAE,
    "cvvae-sd3": _CVVAE,
    "ivvae": _IVVAE,
    "ivvae-baseline": _IVVAE,
    "od-vae": _ODVAE,
    "open-sora-1.2": _OPEN_SORA,
    "image-kl": _of_diffusers(ImageKLVAE, IMAGE_KL_SPECS, with_known_keys=with_new_attention_keys),
    "svd": _of_diffusers(SVDVAE, SVD_SPECS, with_known_keys=with_new_attention_keys),
    "cogvideox": _of_diffusers(CogVideoXVAE, COGVIDEOX_SPECS),
    "wan": _of_diffusers(WanVAE, WAN_SPECS),
    "hunyuan-video": _of_diffusers(HunyuanVideoVAE, HUNYUAN_SPECS),
    "hunyuan-video-1.5": _of_diffusers(HunyuanVideo15VAE, HUNYUAN_15_SPECS),
    "ltx-video": _of_diffusers(LTXVAE, LTX_SPECS),
    "ltx-2": _of_diffusers(LTXVAE, LTX2_SPECS),
    "mochi": _of_diffusers(MochiVAE, MOCHI_SPECS),
}
"""Family of a spec -> what is known of it."""

SPECS: dict[str, VAESpec] = {
    **CVVAE_SPECS,
    **IVVAE_SPECS,
    **ODVAE_SPECS,
    **OPEN_SORA_SPECS,
    **IMAGE_KL_SPECS,
    **SVD_SPECS,
    **COGVIDEOX_SPECS,
    **WAN_SPECS,
    **HUNYUAN_SPECS,
    **HUNYUAN_15_SPECS,
    **LTX_SPECS,
    **LTX2_SPECS,
    **MOCHI_SPECS,
}
"""Every named spec."""


def family_of(spec: VAESpec) -> Family:
    """ValueError if there is none of that name, or the spec is not of its type."""
    if spec.family not in FAMILIES:
        raise ValueError(f"VAESpec {spec.name!r}: family: expected one of {sorted(FAMILIES)}, got {spec.family!r}")
    family = FAMILIES[spec.family]
    if type(spec) is not family.spec_type:
        raise ValueError(
            f"VAESpec {spec.name!r}: expected a {family.spec_type.__name__} for family {spec.family!r}, "
            f"got a {type(spec).__name__}"
        )
    return family


def spec_from_dict(values: Mapping[str, Any]) -> VAESpec:
    """The inverse of `VAESpec.to_dict`. ValueError on an unknown family, or fields that are unknown or missing."""
    family = FAMILIES.get(str(values.get("family")))
    if family is None:
        raise ValueError(f"VAESpec: family: expected one of {sorted(FAMILIES)}, got {values.get('family')!r}")
    expected = {field.name for field in fields(family.spec_type)}
    if set(values) != expected:
        raise ValueError(
            f"VAESpec fields: missing {sorted(expected - set(values))}, unknown {sorted(set(values) - expected)}"
        )
    return family.spec_type(**{key: _frozen(value) for key, value in values.items()})


def _frozen(value: Any) -> Any:
    """JSON's lists are the spec's tuples."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def spec_of_config(config: Mapping[str, Any], *, where: str) -> VAESpec:
    """The spec that a config.json describes. ValueError on a class nobody here knows."""
    by_class = {name: family for family in FAMILIES.values() for name in family.class_names}
    name = config.get("_class_name", config.get("model_type"))
    if not isinstance(name, str) or name not in by_class:
        raise ValueError(f"{where}: _class_name: expected one of {sorted(by_class)}, got {name!r}")
    return by_class[name].spec_from_config(config, where=where)


def spec_of_tensors(tensors: Mapping[str, Tensor], *, where: str) -> VAESpec:
    """The spec of a checkpoint without a config, from its keys and shapes. ValueError unless one family has them."""
    families = {id(family): family for family in FAMILIES.values() if family.recognises(tensors)}
    if len(families) != 1:
        raise ValueError(
            f"{where}: expected the keys of one of the families {sorted(FAMILIES)}, "
            f"got {len(tensors)} keys such as {sorted(tensors)[:3]}; "
            "VAEs of diffusers need their config.json beside them"
        )
    (family,) = families.values()
    return family.spec_from_tensors(tensors, where=where)
