"""One clock for every source of a stream: time stamps where they are sound, and otherwise the time of arrival."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from processing_rice.video_container_rice import LEAP_S, Clock, has_time_stamps

# What can be read within so long had come while the source was opened.
_BACKLOG_S = 0.05
# More packets than a decoder holds back.
_MOST_IN_DECODER = 32
# Frames without a stamp may be as early as this: a decoder gives up several at once.
_EARLY_S = 1.0
# Time stamps may lag so far behind the time that passed, or be ahead, since servers send what they have kept.
_BEHIND_S, _AHEAD_S = 10.0, 60.0


class StreamClock:
    """
    Seconds since the start of a source, over all containers that it is opened with one after the other.

    A recording counts by its time stamps, or by its frame rate. So does a live source with time stamps; where they
    leap, or when the source is opened again, the time that passed in between is added. What is no file and has no time
    stamps counts by the arrival of its packets.

    Args:
        name: Of the source.
        now: A clock, in seconds.
        notify: Is told in one sentence what the times are taken from, if not from sound time stamps.
        on_leap: Called with the seconds by which time stamps leap.

    Attributes:
        last_s: Time of the last frame; `None` before the first.
    """

    def __init__(
        self,
        name: object,
        now: Callable[[], float] = time.monotonic,
        notify: Callable[[str], None] = lambda text: None,
        on_leap: Callable[[float], None] = lambda leap_s: None,
    ):
        self.name, self.now, self.notify, self.on_leap = name, now, notify, on_leap
        self.last_s: float | None = None
        # Since the last frame and since the first one, by `now`.
        self.waited_s = self.elapsed_s = 0.0
        self._stamps: Clock | None = None
        self._opened_s = self._came_s = now()
        self._arrivals: deque[float] = deque(maxlen=_MOST_IN_DECODER)
        self._told: set[str] = set()

    @property
    def shift_s(self) -> float | None:
        """Seconds to add to the present time stamps of the container; `None` while they do not count."""
        return self._stamps and self._stamps.shift_s

    def opening(self) -> None:
        """To be called before a container is opened."""
        self._opened_s = self.now()

    def begin(self, container, stream, is_file: bool, is_live: bool) -> None:
        """
        Goes on with another container.

        Args:
            container, stream: Of PyAV.
            is_file: All of it is there already, so that the time at which it is read says nothing.
            is_live: It shows what happens now.
        """
        self._arrivals.clear()
        self._stamps = None
        if has_time_stamps(container) and is_live:
            self._stamps = _LiveStamps(container, stream, self)
        elif has_time_stamps(container):
            self._stamps = Clock(container, stream, self.on_leap)
        elif is_file:
            self._stamps = Clock(container, stream, self.on_leap)
            self.tell("times", f"has no time stamps; its times count {1 / self._stamps.step_s:g} frames per second")
        else:
            self.tell("times", "has no time stamps; its times are those at which frames arrive")

    def arriving(self, packets: Iterator) -> Iterator:
        """The packets of a container; notes when they come where nothing else tells the time."""
        if self._stamps is not None:
            yield from packets
            return
        yield from self._backlog(packets)
        for packet in packets:
            self._arrivals.append(self.now())
            yield packet

    def _backlog(self, packets: Iterator) -> Iterator:
        """Packets that came while the source was opened, as evenly as a camera sends them; and the first one after."""
        start_s, backlog, later, failure = self.now(), [], [], None
        try:
            for packet in packets:
                if self.now() - start_s > _BACKLOG_S:
                    later.append(packet)
                    break
                backlog.append(packet)
        except Exception as error:
            failure = error
        came_s = self.now()
        for i, packet in enumerate(backlog):
            self._arrivals.append(self._opened_s + (start_s - self._opened_s) * i / len(backlog))
            yield packet
        for packet in later:
            self._arrivals.append(came_s)
            yield packet
        if failure is not None:
            raise failure

    def lost_packet(self) -> None:
        """To be called for a packet that brings no frame."""
        if self._arrivals:
            self._arrivals.popleft()

    def time_of(self, stamp_s: float | None) -> float:
        """Seconds since the start of the source of the frame that is shown next."""
        came_s = self._arrivals.popleft() if self._stamps is None and self._arrivals else self.now()
        if self.last_s is None:
            self._came_s = came_s
        self.waited_s = max(came_s - self._came_s, 0.0)
        self.elapsed_s += self.waited_s
        self._came_s += self.waited_s
        if self._stamps is None:
            self.last_s = (self.last_s or 0.0) + self.waited_s
        else:
            self.last_s = self._stamps.time_of(stamp_s)
        return self.last_s

    def tell(self, kind: str, what: str) -> None:
        """Tells of the source, of each kind of thing once."""
        if kind not in self._told:
            self._told.add(kind)
            self.notify(f"{self.name} {what}")


class _LiveStamps(Clock):
    """Time stamps of one container of a live source, which go on from where the last container ended."""

    def __init__(self, container, stream, clock: StreamClock):
        super().__init__(container, stream, clock.on_leap)
        self.clock, self.shift_s, self.last_s = clock, None, clock.last_s

    def time_of(self, stamp_s: float | None) -> float:
        time_s, passed_s = super().time_of(stamp_s), self.clock.elapsed_s
        is_slow = passed_s > max(time_s + _BEHIND_S, 2 * time_s)
        is_fast = time_s > max(passed_s + _AHEAD_S, 2 * passed_s)
        if is_slow or is_fast:
            # A slow network and a sender with a wrong frame rate look the same from here.
            self.clock.tell("pace", f"has time stamps, which are used, of {time_s:.0f} s in {passed_s:.0f} s of time")
        return time_s

    def _longest_s(self) -> float:
        return LEAP_S + self.clock.waited_s

    def _gap_s(self) -> float:
        # A server that sends ahead of time is not late after a pause.
        return max(self.step_s, min(self.clock.waited_s, self.clock.elapsed_s - self.last_s))

    def _unstamped_s(self) -> float:
        early_s = self.last_s + self.step_s - self.clock.elapsed_s
        return max(self.clock.waited_s, self.step_s if early_s <= _EARLY_S else 0.0)
