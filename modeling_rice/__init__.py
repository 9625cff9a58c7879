"""The RICE model. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel

from .configuration_rice import RiceConfig
from .features_rice import RiceClips, RiceFrames, RiceGallery
from .modeling_rice import RiceModel, RiceOutput

AutoConfig.register("rice", RiceConfig, exist_ok=True)
AutoModel.register(RiceConfig, RiceModel, exist_ok=True)

__all__ = ["RiceClips", "RiceConfig", "RiceFrames", "RiceGallery", "RiceModel", "RiceOutput"]
