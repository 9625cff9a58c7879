"""Changes of an index that are more than adding and removing images."""

from collections.abc import Sequence

from .gallery import GalleryIndex
from .job import features_class_of
from .table import RECORD


def leave_livestream(index: GalleryIndex, image_ids: Sequence[str], live_id: str) -> tuple[list[str], list[str]]:
    """
    Takes images out of a livestream. One that no other livestream sells leaves the index; the others stay, and are
    not encoded anew.

    Returns:
        The ids that were taken out, and those that the livestream does not sell.

    Raises:
        ValueError: the index is damaged where it is read, or being built anew.
        OSError: it cannot be written.
    """
    wanted = list(dict.fromkeys(image_ids))
    known = index.records(wanted)
    sold = [name for name in wanted if live_id in known.get(name, {}).get("live_ids", ())]
    elsewhere = [name for name in sold if len(known[name]["live_ids"]) > 1]
    if elsewhere:
        snapshot = index._newest.to_write().snapshot
        rows = snapshot.find(elsewhere)
        records = rows.select([*RECORD, "content"]).to_pylist()
        for record in records:
            record["live_ids"] = [other for other in record["live_ids"] if other != live_id]
        index.put(records, snapshot.features(rows, features_class_of(index.model)))
    gone = [name for name in sold if name not in elsewhere]
    if gone:
        index.remove(gone)
    return sold, [name for name in wanted if name not in sold]
