"""Processing for RICE. Importing this package registers the processors with transformers' Auto classes."""

from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor, PreTrainedConfig

from .image_processing_rice import RicePillowImageProcessor
from .media_rice import MediaError, open_image
from .processing_rice import RiceProcessor, build_processor
from .text_entries_rice import is_missing, read_text, read_texts
from .tokenization_rice import fold_texts, train_tokenizer
from .video_media_rice import read_video
from .video_processing_rice import RiceVideoProcessor, boxes_to_patch_mask, sample_frame_indices


class _RegistryKey(PreTrainedConfig):
    """Key under which the Auto classes register the processors. They are found by name, so any config class works."""

    model_type = "rice_processor"


AutoProcessor.register(_RegistryKey, RiceProcessor, exist_ok=True)
AutoVideoProcessor.register(_RegistryKey, RiceVideoProcessor, exist_ok=True)
AutoImageProcessor.register(_RegistryKey, image_processor_classes={"pil": RicePillowImageProcessor}, exist_ok=True)

__all__ = [
    "MediaError",
    "RicePillowImageProcessor",
    "RiceProcessor",
    "RiceVideoProcessor",
    "boxes_to_patch_mask",
    "build_processor",
    "fold_texts",
    "is_missing",
    "open_image",
    "read_text",
    "read_texts",
    "read_video",
    "sample_frame_indices",
    "train_tokenizer",
]
