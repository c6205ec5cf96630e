"""Asked to stop: SIGTERM and SIGUSR1 set a flag, and a timer bounds what follows."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """While entered, the first of `SIGNALS` sets ``asked`` to its name, and the process has ``grace`` seconds to end.

    If it has not left by then, it ends with code 1, or with ``code`` once the loop has set ``saved``. Further signals
    change nothing: what is being written is written. Signals are seen while the main thread waits inside a collective
    too, where Python would not call a handler. Enter it in the main thread; elsewhere signals stay as they are.
    """

    def __init__(self, *, grace: float, code: int = 75) -> None:
        self.asked: str | None = None
        self.saved, self.code = False, code
        self._grace = grace
        self._left = threading.Event()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            out, self._in = os.pipe()
            os.set_blocking(self._in, False)
            # The interpreter writes each signal's number here at once, in whichever thread it arrives.
            self._wakeup = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            self._thread = threading.Thread(target=self._watch, args=(out,), name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._before:
            for number, handler in self._before.items():
                # One that was asked is leaving, and whoever asks again must not spoil its exit code.
                signal.signal(number, signal.SIG_IGN if self.asked else handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._in)
            self._thread.join()

    def _watch(self, out: int) -> None:
        with os.fdopen(out, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                if asked := [signal.Signals(number).name for number in numbers if number in SIGNALS]:
                    self.asked = asked[0]
                    break
            # The pipe stays open: a signal that finds it closed is an error, which the interpreter reports.
            if self.asked and not self._left.wait(self._grace):
                how = "as all is saved" if self.saved else "without saving, the newest checkpoint is whole"
                message = f"{self.asked} was {self._grace:g} s ago (run.grace) and the run has not ended; left {how}"
                print(f"bigbatch: {message}", file=sys.stderr, flush=True)
                os._exit(self.code if self.saved else 1)


def end_with_owner() -> None:
    """Have this process end when the one that started it has, however that did."""
    owner = multiprocessing.parent_process()
    assert owner is not None

    def watch() -> None:
        owner.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
