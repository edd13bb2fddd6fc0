"""The published checkpoints by short name; a test compares them with the links of the README."""

import difflib

from util.io.errors import UserError

HOST = "https://huggingface.co/longlian/CrossMAE/resolve/main"
FILES = {  # named by the ratio the model predicts, which some folder names contradict
    "vits-kmr0.75": "vits-mr0.75-kmr0.75-dd12/*vits-{}-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth",
    "vits-kmr0.75-4090": "vits-mr0.75-kmr0.25-dd12/*vits-{}-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth",
    "vitb-kmr0.75": "vitb-mr0.75-kmr0.75-dd12/*vitb-{}-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth",
    "vitb-kmr0.25-448": "vitb-mr0.75-kmr0.75-dd12-448-400/"
    "*vitb-{}-wfm-mr0.75-kmr0.25-dd12-ep400-ui-res-448.pth",
    "vitl-kmr0.75": "vitl-mr0.75-kmr0.75-dd12/*vitl-{}-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth",
    "vith-kmr0.25": "vith-mr0.75-kmr0.25-dd12/*vith-{}-wfm-mr0.75-kmr0.25-dd12-ep800-ui.pth",
}


def published_url(name: str, is_finetuned: bool = False) -> str:
    """URL of the pre-trained checkpoint of that name, or of the fine-tuned one.

    Raises:
        UserError: there is none; lists the names.
    """
    if name not in FILES:
        close = difflib.get_close_matches(name, FILES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"There are no weights {name}{hint}; choose one of {', '.join(FILES)}.")
    file = FILES[name].format("finetune" if is_finetuned else "pretrain")
    return f"{HOST}/{file.replace('*', 'imagenet-mae-cross-')}"
