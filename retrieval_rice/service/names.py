"""Checks field names of requests: unknown fields, and repeated fields of which only one would be read, are errors."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, get_origin

from fastapi import Request

from .work import Refused

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


async def check_names(request: Request) -> None:
    """
    A FastAPI dependency that checks field names.

    Raises:
        Refused: the body is not a form; or a field of it or of the query is unknown, empty or repeated.
    """
    takes = request.scope["route"].dependant
    _check(request.query_params.multi_items(), takes.query_params, "the query")
    if not takes.body_params:
        return
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _FORMS and (kind or request.headers.get("content-length") != "0"):
        given = f"not {kind[:80]!r}" if kind else "and its content-type must say so"
        raise Refused(422, f"The body must be a form ({_FORMS[0]}), {given}.")
    _check((await request.form()).multi_items(), takes.body_params, "the form")


def _check(items: Iterable[tuple[str, Any]], fields: list[Any], place: str) -> None:
    items, known = list(items), {field.alias: field for field in fields}
    for name, count in Counter(name for name, _ in items).items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise Refused(422, f"{name[:80]!r} is not a field of {place} here, which {takes}.")
        if count > 1 and not _is_list(known[name]):
            raise Refused(422, f"{name}: it occurs {count} times; send it once.")
    for name, value in items:
        # An empty field would count as not sent, and the whole index would be searched instead of a livestream.
        if value == "" and not _is_list(known[name]) and known[name].default != "":
            raise Refused(422, f"{name}: it is empty; fill it in, or leave it out.")


def _is_list(field: Any) -> bool:
    return get_origin(field.field_info.annotation) is list
