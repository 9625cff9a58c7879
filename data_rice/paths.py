"""Paths that annotations name, which must stay below their data folder."""

from os import path as osp

from . import parsing


class MediaRoot:
    """Turns paths that annotations name into absolute ones; refuses those that lead out of the folder.

    Args:
        root: the data folder; it may itself be a link.
    """

    def __init__(self, root: str):
        self.root = osp.abspath(root)
        self._real_root = osp.realpath(root)
        self._folders: dict[str, bool] = {}

    def _inside(self, path: str) -> bool:
        real = osp.realpath(path)
        return real == self._real_root or real.startswith(self._real_root.rstrip("/\\") + osp.sep)

    def path(self, value: object, what: str) -> str:
        """Return the absolute path of ``value``; whether anything lies there is not looked at.

        Args:
            value: what the annotation names.
            what: a name for it, such as "image path", for the message.

        Raises:
            ValueError: it is no relative path, or it leads out of the folder, if only through a link (without file and
                line, which the caller adds).
        """
        path = osp.join(self.root, parsing.check_relative_path(value, what))
        folder = osp.dirname(path)
        # Resolving every path of a large folder takes minutes; its folders are few.
        if folder not in self._folders:
            self._folders[folder] = self._inside(folder)
        if not self._folders[folder] or (osp.islink(path) and not self._inside(path)):
            raise ValueError(f"the {what} {value!r} leads out of the data folder through a link; put the files there")
        return path
