"""LPR4M's views as self-contained shards; see `data_rice.prepare`."""

import logging
import os
from collections.abc import Sequence

from .. import parsing
from ..prepare import PrepareSettings, prepare_views
from .lpr4m import VIEWS, Lpr4m

logger = logging.getLogger(__name__)


def prepare(
    data_dir: str,
    output_dir: str,
    *,
    views: Sequence[str] = ("pairs", "query", "gallery"),
    splits: Sequence[str] = ("train", "validation", "test"),
    cache_dir: str | None = None,
    settings: PrepareSettings = PrepareSettings(),
    num_workers: int = 1,
    **builder_options,
) -> dict:
    """Write the shards of all views and splits that the data folder has; a view without files is skipped and logged.

    The training gallery is written only if ``views`` is "gallery" alone, because pairs contain their images.

    Args:
        data_dir: LPR4M as published, or the mini LPR4M.
        output_dir: the folder to write.
        views: any of ``pairs``, ``query``, ``gallery``, ``detection``.
        splits: any of ``train``, ``validation``, ``test``.
        cache_dir: folder of the Arrow files; the default of `datasets` when None.
        settings, num_workers: see `prepare_views`.
        builder_options: see `Lpr4mConfig`.

    Returns:
        See `prepare_views`.

    Raises:
        FileNotFoundError, ValueError: as `Lpr4m` and `prepare_views`.
    """
    for name, given, known in (("view", views, VIEWS), ("split", splits, ("train", "validation", "test"))):
        unknown = [value for value in given if value not in known]
        if unknown:
            raise ValueError(f"There is no {name} {unknown[0]!r}; choose among {', '.join(known)}.")
    found = {}
    sources = []
    for view in views:
        builder = Lpr4m(view, cache_dir=cache_dir, data_dir=data_dir, **builder_options)
        # If the only view cannot be made, the builder raises the error.
        if len(views) > 1 and not builder.source_splits():
            logger.warning("The view %s is skipped: %s", view, builder.missing_source_reason())
            continue
        builder.download_and_prepare()
        sources += builder.config.source_paths()
        for split in builder.info.splits:
            wanted = split in splits and not (view == "gallery" and split == "train" and len(views) > 1)
            if wanted and builder.info.splits[split].num_examples:
                found[view, split] = builder.as_dataset(split=split)
    if not found:
        raise ValueError(f"{data_dir} has no rows in {', '.join(views)} of {', '.join(splits)}; choose others.")
    return prepare_views(
        found,
        output_dir,
        dataset=os.path.basename(os.path.abspath(data_dir)),
        gallery_scope="live",
        source=parsing.fingerprint(sources),
        options=builder_options,
        settings=settings,
        num_workers=num_workers,
    )
