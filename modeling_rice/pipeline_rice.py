"""`pipeline("product-retrieval", model=..., trust_remote_code=True)`: a clip and a shop in, a ranking out."""

import os
from collections.abc import Mapping

from PIL import Image
from transformers import Pipeline

from .comparison_rice import encode_candidates, list_candidates
from .scoring_rice import best_first, check_count, ranked_scores

TASK = "product-retrieval"

# What a saved model's config says, so that `pipeline` finds the class below.
CUSTOM_PIPELINES = {
    TASK: {"impl": "pipeline_rice.ProductRetrievalPipeline", "pt": ["AutoModel"], "type": "multimodal"}
}


class ProductRetrievalPipeline(Pipeline):
    """
    Ranks a shop's images for livestream clips. Images are found by embedding, and the best of them are ranked by the
    model's own choice of score, `config.ranking`.

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
                and perhaps `asr`; so a list of paths is a list of videos, and a clip of frames by path is a list
                within the list.
            candidates: The shop: images (PIL, arrays, tensors, paths), an encoded `RiceGallery`, or the path of a
                saved one. Encoded once per call; given to `pipeline(...)`, once for all calls.
            titles (`list[str]`, *optional*): The candidates' titles.
            asr (`str`, *optional*): What is said in the clip, for models that read it.
            labels (`list`, *optional*): What the answers call the candidates; by default the title, else the path,
                else the index.
            top_k (`int`, *optional*, defaults to 5): Answers per clip at most.
            rank_by (`str`, *optional*): `"embedding"`, `"matching"`, `"alignment"` or `"fused"`, those that the model
                has; by default `config.ranking`, see there.
            rerank (`int`, *optional*, defaults to 100): By other scores than the embedding's, how many images are
                scored, the most similar ones; at least `top_k`. Fused scores are relative to these. `None`: all.
            batch_size (`int`, *optional*, defaults to 1): Clips at a time.

        Returns:
            For a clip, its answers from best to worst, each a dict of `score` (by which they are ranked; fused and
            matching scores are not bounded), `similarity` (of the embeddings), `index` and `label`. For a list of
            clips, a list of such lists.

        Raises:
            ValueError: no candidates, an empty clip, counts that do not fit, an unreadable picture or video, a
                gallery of another model.
            FileNotFoundError: a file that is missing.
        """
        if not isinstance(inputs, (list, tuple)):
            return super().__call__(inputs, **kwargs)
        if len(inputs) == 0:
            raise ValueError("There is no clip; give the path of a video, or a list of frames.")
        if _is_frame(inputs[0]):
            # A tuple is one input, where a list is many.
            return super().__call__(tuple(inputs), **kwargs)
        return super().__call__(list(inputs), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """The model and the processor, which pipelines of transformers leave out."""
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
            raise TypeError(f"The {TASK} pipeline takes no argument {next(iter(kwargs))!r}.")
        for name, value in (("top_k", top_k), *rerank.items()):
            check_count(name, value)
        forward, postprocess = dict(rerank), {}
        if candidates is not None:
            self.model.eval()
            # Needed twice, for the encodings and for the labels.
            candidates = list(candidates) if hasattr(candidates, "__next__") else candidates
            titles = None if titles is None else self.processor.read_texts(titles)
            forward["gallery"] = encode_candidates(self.model, self.processor, candidates, titles)
            postprocess["labels"] = _labels(candidates, titles, labels, len(forward["gallery"]))
        elif titles is not None or labels is not None:
            raise ValueError("`titles` and `labels` belong to `candidates`, which were not given.")
        if top_k is not None:
            forward["top_k"] = postprocess["top_k"] = top_k
        if rank_by is not None:
            forward["rank_by"] = rank_by
        return {} if asr is None else {"asr": asr}, forward, postprocess

    def preprocess(self, inputs, asr: str | None = None) -> dict:
        clip = list(inputs) if isinstance(inputs, tuple) else inputs
        if asr is None and isinstance(clip, Mapping):
            asr = clip.get("asr")
        # Clips of one length are what a batch can be made of; padded frames are not encoded.
        return dict(
            self.processor(videos=[clip], asr=None if asr is None else [asr], videos_kwargs={"padding": "max_length"})
        )

    def _forward(
        self, model_inputs, gallery=None, rank_by: str | None = None, rerank: int | None = 100, top_k: int = 5
    ) -> dict:
        if gallery is None:
            raise ValueError("`candidates` are missing: give the shop's images, or a saved gallery.")
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
