"""What a run shows while it works: a live bar on a terminal, plain lines when piped, nothing when quiet."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


class Display:
    """Turns events into lines and, on a terminal, into one live bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=None, detail="", visible=False)
        self._variant: tuple[object, object] | None = None
        self._detail = ""
        self._doing = ""

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: str, values: Mapping[str, Any]) -> None:
        """Show one event."""
        handler = getattr(self, f"_on_{event}", None)
        if handler is not None:
            handler(values)

    def _on_run(self, values: Mapping[str, Any]) -> None:
        done = values["steps"] - values["todo"]
        self._line(f"{values['name']}: {values['steps']} steps, {done} done before")

    def _on_start(self, values: Mapping[str, Any]) -> None:
        self._detail = ""
        self._doing = _what(values)
        name = f"[{values['number']}/{values['todo']}] {self._name(values)}"
        self._progress.update(self._task, description=name, total=None, completed=0, detail=self._doing, visible=True)

    def _on_step(self, values: Mapping[str, Any]) -> None:
        detail = self._detail or self._doing
        if values.get("robust") is not None:
            detail += f"  {values['robust']} of {values['step']} still right"
        self._progress.update(self._task, total=values.get("steps"), completed=values.get("step", 0), detail=detail)

    def _on_epoch(self, values: Mapping[str, Any]) -> None:
        robust = f"  robust(val) {values['robust']:.1%}" if values.get("robust") is not None else ""
        left = f"  {_clock(values['eta'])} left" if values.get("eta") else ""
        test = ""
        if values.get("test_accuracy") is not None:
            test = f"  test {values['test_accuracy']:.1%} (loss {values['test_loss']:.3f})"
        text = (
            f"epoch {values['epoch'] + 1}/{values.get('epochs', '?')}  loss {values['loss']:.3f}"
            f"  train {values['train_accuracy']:.1%}  clean(val) {values['clean']:.1%}{robust}{test}"
        )
        self._detail = text + left
        self._line(f"  {self._name(values):28} {text}{left}")

    def _on_done(self, values: Mapping[str, Any]) -> None:
        if values["kind"] == "fit" or values["seconds"] >= 5:
            self._line(f"  {self._name(values):28} {self._doing} in {_clock(values['seconds'])}")

    def _on_failed(self, values: Mapping[str, Any]) -> None:
        self._line(f"  {self._name(values):28} failed: {values['message']}", style="bold red")

    def _on_guard(self, values: Mapping[str, Any]) -> None:
        self._line(f"  {self._name(values):28} guard: {values.get('message', '')}", style="yellow")

    def _on_estimate(self, values: Mapping[str, Any]) -> None:
        self._line(
            f"  {self._name(values):28} {self._doing}: at most {values['passes']:,.0f} passes an example, "
            f"{_clock(values['seconds'])} if none is fooled (AutoAttack: {values['autoattack_passes']:,.0f}, "
            f"{_clock(values['autoattack_seconds'])})"
        )

    def _on_data(self, values: Mapping[str, Any]) -> None:
        self._line(f"  {self._name(values):28} data: {values.get('message', '')}")

    def _on_projection(self, values: Mapping[str, Any]) -> None:
        if values["seconds"] >= 60:
            self._line(f"  {self._name(values):28} training takes about {_clock(values['seconds'])}")

    def _on_warning(self, values: Mapping[str, Any]) -> None:
        whose = f"{values['variant']}: " if values.get("variant") else ""
        self._line(f"  warning: {whose}{values['message']}", style="yellow")

    def _name(self, values: Mapping[str, Any]) -> str:
        return str(values.get("variant") or values.get("kind") or "")

    def _line(self, text: str, style: str | None = None) -> None:
        self._progress.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _what(values: Mapping[str, Any]) -> str:
    if values["kind"] == "fit":
        return "made"
    return f"attack {values['description']}" if values["kind"] == "attack" else str(values["description"])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{seconds:.1f} s"
