"""`pipeline("product-retrieval", model=..., trust_remote_code=True)`: ranks a shop's images for a clip."""

import os
from collections.abc import Mapping

from PIL import Image
from transformers import Pipeline

from .comparison_rice import encode_candidates, list_candidates
from .scoring_rice import best_first, check_count, ranked_scores

TASK = "product-retrieval"

# Entry of a saved model's config by which `pipeline` finds the class below.
CUSTOM_PIPELINES = {
    TASK: {"impl": "pipeline_rice.ProductRetrievalPipeline", "pt": ["AutoModel"], "type": "multimodal"}
}


class ProductRetrievalPipeline(Pipeline):
    """
    Ranks a shop's images for livestream clips. The embeddings select the most similar images; these are then ranked by
    the model's default score, `config.ranking`. The pipeline puts its model in eval mode and leaves it so.

    Examples:

    ```python
    retrieve = pipeline("product-retrieval", model="someone/rice-mugs", trust_remote_code=True)
    retrieve("clip.mp4", candidates=["red_mug.jpg", "blue_mug.jpg"], top_k=1)
    # [{"score": 4.3, "similarity": 0.61, "index": 0, "label": "red_mug.jpg"}]
    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.eval()

    def __call__(self, inputs, **kwargs):
        """
        Args:
            inputs: A clip, or a list of clips. A clip is a list of frames (PIL images or arrays), a `(T, H, W, 3)` or
                `(T, 3, H, W)` array or tensor, the path of a video, or a row of a data set with `frames` or `video`
                and optionally `asr`. A list of paths is a list of videos; for a clip whose frames are paths, give a
                list that contains the list of paths.
            candidates: The shop: images (PIL, arrays, tensors, paths), an encoded `RiceGallery`, or the path of a
                saved gallery. Images are encoded once per call, or once for all calls if given to `pipeline(...)`.
            titles (`list[str]`, *optional*): Titles of the candidates.
            asr (`str`, *optional*): ASR of the clip, for models that read it.
            labels (`list`, *optional*): Labels of the candidates in the answers; by default the title, else the path,
                else the index.
            top_k (`int`, *optional*, defaults to 5): Maximum number of answers per clip.
            rank_by (`str`, *optional*): `"embedding"`, `"matching"`, `"alignment"` or `"fused"`, as far as the model
                has them; by default `config.ranking` (see [`RiceConfig`]).
            rerank (`int`, *optional*, defaults to 100): Number of images, the most similar by embedding, that get
                another score than the embedding's; at least `top_k`. Fused scores are relative to these images. `None`
                scores all images.
            batch_size (`int`, *optional*, defaults to 1): Clips encoded at a time.

        Returns:
            For a clip, its answers from best to worst, each a dict of `score` (used for ranking; fused and matching
            scores are not bounded), `similarity` (cosine of the embeddings), `index` and `label`. For a list of clips,
            a list of such lists.

        Raises:
            TypeError: for an unknown argument.
            ValueError: no candidates, an empty clip, numbers of titles or labels that differ from the number of
                candidates, an unreadable image or video, a gallery of another model.
            FileNotFoundError: a missing file.
        """
        if not isinstance(inputs, (list, tuple)):
            return super().__call__(inputs, **kwargs)
        if len(inputs) == 0:
            raise ValueError("There is no clip; give the path of a video, or a list of frames.")
        if _is_frame(inputs[0]):
            # Pipelines take a tuple as one input and a list as many.
            return super().__call__(tuple(inputs), **kwargs)
        return super().__call__(list(inputs), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the model and also the processor, which the pipelines of transformers omit."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self,
        candidates=None,
        titles: list[str] | None = None,
        labels: list | None = None,
        top_k: int | None = None,
        rank_by: str | None = None,
        asr: str | None = None,
        **kwargs,
    ) -> tuple[dict, dict, dict]:
        rerank = {"rerank": kwargs.pop("rerank")} if "rerank" in kwargs else {}
        if kwargs:
            raise TypeError(f"The {TASK} pipeline takes no argument {next(iter(kwargs))!r}; leave it out.")
        for name, value in (("top_k", top_k), *rerank.items()):
            check_count(name, value)
        forward, postprocess = dict(rerank), {}
        if candidates is not None:
            self.model.eval()
            # An iterator is needed twice: for the encodings and for the labels.
            candidates = list(candidates) if hasattr(candidates, "__next__") else candidates
            titles = None if titles is None else self.processor.read_texts(titles)
            forward["gallery"] = encode_candidates(self.model, self.processor, candidates, titles)
            postprocess["labels"] = _labels(candidates, titles, labels, len(forward["gallery"]))
        elif titles is not None or labels is not None:
            raise ValueError("`titles` and `labels` belong to `candidates`, which were not given; give them too.")
        if top_k is not None:
            forward["top_k"] = postprocess["top_k"] = top_k
        if rank_by is not None:
            forward["rank_by"] = rank_by
        return {} if asr is None else {"asr": asr}, forward, postprocess

    def preprocess(self, inputs, asr: str | None = None) -> dict:
        clip = list(inputs) if isinstance(inputs, tuple) else inputs
        if asr is None and isinstance(clip, Mapping):
            asr = clip.get("asr")
        # Batches need clips of equal length; padded frames are not encoded.
        return dict(
            self.processor(videos=[clip], asr=None if asr is None else [asr], videos_kwargs={"padding": "max_length"})
        )

    def _forward(
        self, model_inputs, gallery=None, rank_by: str | None = None, rerank: int | None = 100, top_k: int = 5
    ) -> dict:
        if gallery is None:
            raise ValueError("`candidates` are missing; give the shop's images, or a saved gallery.")
        if rerank is not None:
            rerank = max(rerank, top_k)
        clips = self.model.encode_clips(**model_inputs)
        scores, known = ranked_scores(self.model, clips, gallery, rank_by, rerank)
        return {"scores": scores, "cosines": known["embedding"]}

    def postprocess(self, model_outputs, labels: list | None = None, top_k: int = 5) -> list[dict]:
        scores, cosines = model_outputs["scores"][0], model_outputs["cosines"][0]
        return [
            {"score": scores[i].item(), "similarity": cosines[i].item(), "index": i, "label": labels[i]}
            for i in best_first(scores, top_k)
        ]


def _is_frame(value) -> bool:
    return isinstance(value, Image.Image) or getattr(value, "ndim", 0) in (2, 3)


def _labels(candidates, titles: list[str] | None, labels: list | None, count: int) -> list:
    if labels is not None:
        if isinstance(labels, str) or not hasattr(labels, "__len__"):
            raise ValueError(f"`labels` is a {type(labels).__name__}; give a list, one per candidate.")
        if len(labels) != count:
            raise ValueError(f"`labels` has {len(labels)} entries for {count} candidates; give one per candidate.")
        return list(labels)
    names = [os.fspath(path) if isinstance(path, (str, os.PathLike)) else None for path in list_candidates(candidates)]
    names = names if len(names) == count else [None] * count
    titles = titles or [None] * count
    return [title or name or str(i) for i, (title, name) in enumerate(zip(titles, names, strict=True))]
