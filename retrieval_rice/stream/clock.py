"""One clock for every source of a stream: valid time stamps, otherwise the time of arrival."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from processing_rice.video_container_rice import LEAP_S, Clock, has_time_stamps

# Packets that can be read within this time arrived while the source was opened.
_BACKLOG_S = 0.05
# More packets than a decoder delays.
_MOST_IN_DECODER = 32
# Frames without a time stamp may be this early, because a decoder may return several at once.
_EARLY_S = 1.0
# Time stamps may differ this much from the elapsed time, because servers send buffered data.
_BEHIND_S, _AHEAD_S = 10.0, 60.0


class StreamClock:
    """
    Seconds since the start of a source, over all containers with which it is opened.

    The times of a recording are its time stamps, or follow its frame rate. A live source with time stamps uses them
    too; if they jump, or if the source is opened again, the elapsed time is added. Other sources without time stamps
    use the arrival of their packets.

    Args:
        name: Name of the source.
        now: A clock, in seconds.
        notify: Called with one sentence on the origin of the times, if they are not valid time stamps.
        on_leap: Called with the seconds by which time stamps jump.

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
        # Times of the last and the first frame, by `now`.
        self.waited_s = self.elapsed_s = 0.0
        self._stamps: Clock | None = None
        self._opened_s = self._came_s = now()
        self._arrivals: deque[float] = deque(maxlen=_MOST_IN_DECODER)
        self._told: set[str] = set()

    @property
    def shift_s(self) -> float | None:
        """Seconds to add to the container's current time stamps; `None` while they are not used."""
        return self._stamps and self._stamps.shift_s

    def opening(self) -> None:
        """Call this before a container is opened."""
        self._opened_s = self.now()

    def begin(self, container, stream, is_file: bool, is_live: bool) -> None:
        """
        Continues with another container.

        Args:
            container, stream: Objects of PyAV.
            is_file: The source is complete, so the time of reading has no meaning.
            is_live: The source is live.
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
        """The packets of a container; records their arrival if there is no other source of time."""
        if self._stamps is not None:
            yield from packets
            return
        yield from self._backlog(packets)
        for packet in packets:
            self._arrivals.append(self.now())
            yield packet

    def _backlog(self, packets: Iterator) -> Iterator:
        """Packets that arrived while the source was opened, with even arrival times; and the first later packet."""
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
        """Call this for a packet that gives no frame."""
        if self._arrivals:
            self._arrivals.popleft()

    def time_of(self, stamp_s: float | None) -> float:
        """Time of the next frame, in seconds since the start of the source."""
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
        """Sends a notice on the source, once per kind."""
        if kind not in self._told:
            self._told.add(kind)
            self.notify(f"{self.name} {what}")


class _LiveStamps(Clock):
    """Time stamps of one container of a live source; they continue at the end of the previous container."""

    def __init__(self, container, stream, clock: StreamClock):
        super().__init__(container, stream, clock.on_leap)
        self.clock, self.shift_s, self.last_s = clock, None, clock.last_s

    def time_of(self, stamp_s: float | None) -> float:
        time_s, passed_s = super().time_of(stamp_s), self.clock.elapsed_s
        is_slow = passed_s > max(time_s + _BEHIND_S, 2 * time_s)
        is_fast = time_s > max(passed_s + _AHEAD_S, 2 * passed_s)
        if is_slow or is_fast:
            # A slow network and a sender with a wrong frame rate cannot be distinguished.
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
