"""What the demo found: the closing table, report.json and the picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
    """Losses in nats a token on the held-out text of all clients together; bytes a client and round; whole seconds.

    `local_losses` are of `clients` in their order, each after as many local steps alone as the federation's clients took;
    empty where nobody tuned alone.
    `held_out_by_release` is what the coordinator put together from the clients' own measurements, release by release.
    """

    clients: list[str]
    base_loss: float
    local_losses: list[float]
    federated_loss: float
    rounds: int
    local_steps: int
    bytes_up_per_client_round: float
    bytes_down_per_client_round: float
    float32_bytes: int
    wire_bytes_up: int
    seconds: float
    seconds_federated: float
    peak_rss_mb: int
    release_digests: list[str]
    held_out_by_release: list[float | None]
    held_out_tokens: int
    codec: str
    method: str
    model: str
    seed: int

    @property
    def ratio(self) -> float:
        return self.float32_bytes / self.bytes_up_per_client_round

    def write(self, folder: Path) -> None:
        """report.json and loss.png."""
        (folder / "report.json").write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        _picture(self, folder / "loss.png")


def table(report: Report) -> Any:
    """The closing table."""
    from rich.table import Table

    shown = Table(
        "",
        "held-out loss",
        "perplexity",
        "better than base by",
        title=f"on the text of all {len(report.clients)} clients",
    )
    for column in shown.columns[1:]:
        column.justify = "right"
    rows = [("base", report.base_loss)]
    rows += [(f"{name} alone", loss) for name, loss in zip(report.clients, report.local_losses, strict=False)]
    rows += [("federated", report.federated_loss)]
    for name, loss in rows:
        gain = "" if name == "base" else f"{report.base_loss - loss:.4f}"
        style = "bold green" if name == "federated" else ""
        shown.add_row(name, f"{loss:.4f}", f"{2.718281828459045**loss:.2f}", gain, style=style)
    return shown


def lines(report: Report) -> list[str]:
    """What the table does not say."""
    return [
        f"{report.rounds} rounds of {report.local_steps} local steps; {report.method}; deltas as {report.codec}",
        f"up: {report.bytes_up_per_client_round:,.0f} bytes a client and round, {report.ratio:.1f} times smaller than"
        f" float32 ({report.float32_bytes:,}); down: {report.bytes_down_per_client_round:,.0f}",
        f"{report.seconds:.0f} s in all, {report.peak_rss_mb:,} MB at most in all processes together",
    ]


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _picture(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    known = [(i, loss) for i, loss in enumerate(report.held_out_by_release) if loss is not None]
    axes.plot(
        [i for i, _ in known],
        [loss for _, loss in known],
        "o-",
        color="#1b7837",
        lw=2,
        label="federated, by the clients",
    )
    axes.axhline(report.base_loss, color="#444444", ls="--", lw=1, label="base")
    for i, (name, loss) in enumerate(zip(report.clients, report.local_losses, strict=False)):
        axes.axhline(loss, color=f"C{i}", ls=":", lw=1.5, label=f"{_short(name)} alone")
    axes.set(
        xlabel="release", ylabel="held-out loss (nats a token)", title=f"{report.model}: {len(report.clients)} clients"
    )
    axes.set_xticks(range(len(report.held_out_by_release)))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
