"""What a report says about probabilities: how sure the answers are, beside how often they are right."""

from collections.abc import Sequence

from amt.evaluation.calibration import calibration
from amt.report.shown import Shown, domains
from amt.report.tables import Cell, Table, counted, rounded


def certainty(shown: Sequence[Shown]) -> Table | None:
    """Clean answers by domain and run; None where no run kept its answers."""
    several, rows = len(shown) > 1, []
    for name in domains(shown):
        for each in shown:
            if (found := calibration(each.run, name)) is not None:
                numbers = (found.right, found.probability, found.error)
                head = (Cell(name), *([Cell(each.label)] if several else []))
                rows.append((*head, *map(rounded, numbers), counted(found.images)))
    heads = ("domain", *(["run"] if several else []), "right", "probability", "calibration error", "images")
    return Table(heads, rows) if rows else None
