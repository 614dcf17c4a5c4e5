"""The page: class slots, new pictures, answers, and one picture under attack.

What belongs to one person is in `gr.State`, of which gradio keeps one for each open page.
"""

import functools
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.themes import Default

from amt.app import answers, example
from amt.app.answers import MOST_CLASSES, MOST_EXAMPLES, MOST_QUERIES, Answers, Examples, Source
from amt.app.server import KEPT_FOR
from meta_dataset_readers.errors import InputError, printable

FIRST_SHOWN = 3  # class slots
LARGEST_EPSILON = 16
FONTS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]  # of the reader's own system
MONOSPACE = ["ui-monospace", "Consolas", "monospace"]
CSS = """
.gradio-container { max-width: 1200px !important; margin: auto; }
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)) !important; }
#answers .grid-wrap { min-height: 0; height: auto; }
#answers .grid-container { grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)) !important; }
"""
ABOUT = """# Your pictures, a few of each class
Drop a few labelled pictures of each class, then new ones. Nothing is trained: adapters of `{pool}` are merged
for your classes. Pictures stay on this computer, and are removed when the program ends."""
ATTACK = """### Under attack
PGD looks for the change of the chosen picture that changes its answer; no value of a pixel moves by more than
epsilon."""


class Slots(NamedTuple):
    """The class slots.

    Args:
        columns: the slots; those that are not shown yet are hidden.
        names, galleries: what is in each.
    """

    columns: list[gr.Column]
    names: list[gr.Textbox]
    galleries: list[gr.Gallery]


class Answered(NamedTuple):
    """What shows the answers: the panel, which holds the attack, too; the answers of all pictures and of the
    chosen one, the adapters, and what was not read."""

    panel: gr.Column
    gallery: gr.Gallery
    probabilities: gr.Label
    merged: gr.Label
    notes: gr.Markdown


class Attacked(NamedTuple):
    """What shows one picture under attack; the panel holds the rest, hidden while there is nothing."""

    panel: gr.Column
    verdict: gr.Markdown
    clean: gr.Image
    perturbation: gr.Image
    attacked: gr.Image
    before: gr.Label
    after: gr.Label


def look() -> dict[str, Any]:
    """How the page looks, as arguments of gradio's `launch`; nothing of it comes from the network."""
    return {"theme": Default(font=FONTS, font_mono=MONOSPACE), "css": CSS}


def build(source: Source, pool: str) -> gr.Blocks:
    """The page for the classifiers of a pool, which it calls `pool`."""
    cleaning = (KEPT_FOR // 6, KEPT_FOR)
    with gr.Blocks(title="AMT", analytics_enabled=False, delete_cache=cleaning) as blocks:
        person, chosen = gr.State(None, time_to_live=KEPT_FOR), gr.State(0)
        gr.Markdown(ABOUT.format(pool=printable(pool).replace("`", "'")))
        slots = _slots()
        with gr.Row():
            count, more = gr.State(FIRST_SHOWN), gr.Button("Add a class", size="sm")
            fill = gr.Button("Fill in an example: traffic signs", size="sm", elem_id="example")
        new = _drop(f"New pictures, up to {MOST_QUERIES}", "new")
        classify = gr.Button("Classify", variant="primary", elem_id="classify")
        with gr.Column(visible=False, elem_id="answered") as panel:
            answered = _answered(panel)
            gr.Markdown(ATTACK)
            epsilon = gr.Slider(
                0,
                LARGEST_EPSILON,
                4,
                step=0.5,
                label="epsilon, in 1/255 of the pixel range",
                elem_id="epsilon",
            )
            run = gr.Button("Attack", variant="primary", elem_id="attack")
            attacked = _attacked()

    with blocks:
        given = [*slots.names, *slots.galleries, new]
        _on(more.click, _one_more, [count], [count, more, *slots.columns])
        _on(fill.click, _filled, [], given)
        results = [person, chosen, *answered, *attacked]
        _on(classify.click, functools.partial(_classified, source), given, results)
        _on(answered.gallery.select, _choose, [person], [chosen, answered.probabilities, *attacked])
        _on(run.click, functools.partial(_attack, source), [person, chosen, epsilon], [*attacked])
    return blocks


# --- parts -------------------------------------------------------------------------------------------------


def _slots() -> Slots:
    columns, names, galleries = [], [], []
    with gr.Row():
        for k in range(MOST_CLASSES):
            with gr.Column(min_width=300, visible=k < FIRST_SHOWN) as column:
                names.append(gr.Textbox(f"class {k + 1}", label="Name", max_length=60, elem_id=f"name-{k}"))
                galleries.append(_drop(f"Its pictures, up to {MOST_EXAMPLES}", f"class-{k}"))
            columns.append(column)
    return Slots(columns, names, galleries)


def _drop(label: str, elem_id: str) -> gr.Gallery:
    """Where pictures are dropped; they are read from their files, by us."""
    return gr.Gallery(
        label=label,
        elem_id=elem_id,
        elem_classes="pictures",
        height=190,
        object_fit="contain",
        format="png",
        type="filepath",
        file_types=["image"],
        interactive=True,
        buttons=[],
    )


def _answered(panel: gr.Column) -> Answered:
    with gr.Row():
        with gr.Column(min_width=320, scale=2):
            gallery = gr.Gallery(
                label="Answers: choose one",
                elem_id="answers",
                height="auto",
                object_fit="contain",
                format="png",
                allow_preview=False,
                interactive=False,
                buttons=[],
            )
            notes = gr.Markdown(elem_id="notes")
        with gr.Column(min_width=320):
            probabilities = gr.Label(label="Probabilities of the chosen picture", elem_id="probabilities")
            merged = gr.Label(label="Adapters merged", elem_id="merged")
    return Answered(panel, gallery, probabilities, merged, notes)


def _attacked() -> Attacked:
    with gr.Column(visible=False, elem_id="under-attack") as panel:
        verdict = gr.Markdown(elem_id="verdict")
        with gr.Row():
            clean, perturbation, attacked = (
                gr.Image(
                    label=name,
                    elem_id=f"image-{name}",
                    format="png",
                    height=260,
                    min_width=160,
                    interactive=False,
                    buttons=[],
                )
                for name in ("clean", "perturbation", "attacked")
            )
        with gr.Row():
            before = gr.Label(label="Before", elem_id="before", min_width=240)
            after = gr.Label(label="Under attack", elem_id="after", min_width=240)
    return Attacked(panel, verdict, clean, perturbation, attacked, before, after)


# --- what happens ------------------------------------------------------------------------------------------


def _on(event: Callable, does: Callable, inputs: Sequence, outputs: Sequence) -> None:
    """Have an event do something; an `InputError` is shown to the person as its one line."""

    @functools.wraps(does)
    def said(*values: Any) -> Any:
        try:
            return does(*values)
        except InputError as error:
            raise gr.Error(html.escape(printable(error)), print_exception=False) from error

    event(said, list(inputs), list(outputs), api_visibility="private")


def _one_more(count: int) -> list:
    count = min(count + 1, MOST_CLASSES)
    shown = [gr.Column(visible=k < count) for k in range(MOST_CLASSES)]
    return [count, gr.Button(interactive=count < MOST_CLASSES), *shown]


def _filled() -> list:
    drawn = example.draw()
    spare = MOST_CLASSES - len(drawn.classes)
    names = [*drawn.classes, *(f"class {k + 1}" for k in range(len(drawn.classes), MOST_CLASSES))]
    return [*names, *drawn.classes.values(), *[None] * spare, drawn.new]


def _classified(source: Source, *given: Any) -> list:
    names, galleries, new = given[:MOST_CLASSES], given[MOST_CLASSES:-1], given[-1]
    slots = [Examples(name, _files(held)) for name, held in zip(names, galleries, strict=True)]
    found = answers.answer(source, slots, _files(new))
    shown = [
        (answers.enlarged(image), f"{name} {100 * share:.0f}%")
        for image, (name, share) in zip(found.images, map(found.best, range(len(found.images))), strict=True)
    ]
    merged = gr.Label(answers.adapters(found.task), show_heading=False)
    shows = gr.Column(visible=True)
    return [found, 0, shows, shown, _probabilities(found, 0), merged, _notes(found), *_nothing()]


def _files(held: Sequence | None) -> tuple[Path, ...]:
    """What is in a gallery, which gives files with captions."""
    return tuple(Path(file) for file, _ in held or ())


def _probabilities(found: Answers, number: int) -> dict[str, float]:
    return answers.shares(found, found.probabilities[number])


def _notes(found: Answers) -> str:
    """What was not read, as text: names of files may hold anything."""
    lines = (f"Not read: {html.escape(printable(line))}" for line in found.unread)
    return "<br>".join(lines)


def _choose(found: Answers | None, event: gr.SelectData) -> list:
    if found is None:
        raise InputError("the answers are gone, as they are after an hour; classify again")
    return [event.index, _probabilities(found, event.index), *_nothing()]


def _attack(source: Source, found: Answers | None, number: int, epsilon: float | None) -> list:
    if found is None:
        raise InputError("no answer to attack yet; classify pictures first")
    if epsilon is None:
        raise InputError(f"no epsilon; expected 0 to {LARGEST_EPSILON}")
    seen = answers.attack(found, number, epsilon, source.merging.seed)
    amplified = "perturbation" if seen.factor is None else f"perturbation, {seen.factor:.0f} times"
    clean, perturbation, attacked = seen.pictures
    verdict = html.escape(answers.verdict(seen, epsilon))
    shows = gr.Column(visible=True)
    return [shows, verdict, clean, gr.Image(perturbation, label=amplified), attacked, seen.before, seen.after]


def _nothing() -> list:
    """No picture under attack: the one before was another."""
    return [gr.Column(visible=False), *[None] * (len(Attacked._fields) - 1)]
