"""The layout of the page, and which control asks for what."""

from pathlib import Path
from types import ModuleType
from typing import Any

from tools.app.explainer import KINDS, PREDICTED, Explainer, as_markdown

INVITATION = 'Drop a picture, or choose an example.'


def uploaded_file(payload: Any) -> str | None:
    """The file of an upload, unopened: Gradio's own function would fail with a traceback on a file that is no image."""
    return None if payload is None else payload.path


def build_page(gr: ModuleType, explainer: Explainer, title: str, examples: list[Path]) -> Any:
    """Lay out the page.

    Args:
        gr: the module gradio.
        explainer: answers.
        title: of the page: the network and its checkpoint.
        examples: pictures to offer.

    Returns:
        A `gradio.Blocks`.
    """
    kinds = explainer.kinds()

    def answer(path, kind, stage, block, window, class_):
        if path is None:
            return None, None, '', INVITATION, window
        return tuple(explainer.explain(path, kind, stage, block, window, class_))

    def choose_window(path, kind, stage, block, class_, overlay, event: gr.SelectData):
        if path is None or overlay is None:
            return None, None, '', INVITATION, None
        return answer(path, kind, stage, block, explainer.window_at(*event.index, overlay), class_)

    def show_controls(kind, stage, block):
        depth = explainer.depths[stage - 1]
        is_by_block = KINDS[kind] not in ('gradcam', 'rollout')
        return (
            gr.Radio(choices=list(range(1, depth + 1)), value=min(block, depth), visible=is_by_block),
            gr.Dropdown(visible=KINDS[kind] == 'gradcam'),
        )

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f'# What the network looks at\n{as_markdown(title)}')
        window = gr.State(None)
        with gr.Row():
            with gr.Column():
                upload = gr.Image(label='Picture', type='filepath', sources=['upload', 'clipboard'], height=360)
                upload.preprocess = uploaded_file
                label = gr.Label(label='Classes', num_top_classes=5, visible=bool(explainer.predictor.class_names))
                if examples:
                    gr.Examples([[str(path)] for path in examples], upload, label='Examples')
            with gr.Column():
                kind = gr.Radio(kinds, value=kinds[0], label='Show')
                with gr.Row():
                    depths = explainer.depths
                    stage = gr.Radio(list(range(1, len(depths) + 1)), value=len(depths), label='Stage')
                    block = gr.Radio(list(range(1, depths[-1] + 1)), value=depths[-1], label='Block')
                    classes = [PREDICTED, *explainer.predictor.class_names]
                    class_ = gr.Dropdown(classes, value=PREDICTED, label='Class')
                overlay = gr.Image(
                    label='What the network sees',
                    interactive=False,
                    format='png',
                    height=440,
                    buttons=['download', 'fullscreen'],
                )
                colours = gr.HTML()
                note = gr.Markdown(INVITATION)
        inputs, outputs = [upload, kind, stage, block, window, class_], [label, overlay, colours, note, window]
        page.load(show_controls, [kind, stage, block], [block, class_], show_progress='hidden')
        for control in (kind, stage):
            control.change(show_controls, [kind, stage, block], [block, class_], show_progress='hidden')
        gr.on(
            [control.change for control in (upload, kind, stage, block, class_)],
            answer,
            inputs,
            outputs,
            trigger_mode='always_last',
        )
        overlay.select(choose_window, [upload, kind, stage, block, class_, overlay], outputs)
    return page
