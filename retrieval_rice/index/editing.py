"""Changes of an index beyond adding and removing images."""

from collections.abc import Sequence

from .gallery import GalleryIndex
from .job import features_class_of
from .table import RECORD


def leave_livestream(index: GalleryIndex, image_ids: Sequence[str], live_id: str) -> tuple[list[str], list[str]]:
    """
    Removes images from a livestream. An image that no other livestream sells is removed from the index. The others
    stay and are not encoded again.

    Returns:
        The removed ids, and the ids that the livestream does not sell.

    Raises:
        ValueError: the index is damaged, or is being built again.
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
