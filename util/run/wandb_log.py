"""--wandb PROJECT: what TensorBoard gets, also in Weights & Biases (an optional package)."""

import secrets
from pathlib import Path

from util.io.checkpoint_file import plain_args

ID_FILE = "wandb_id.txt"  # in the output folder: a resumed run continues its curves


class WandbWriter:
    """A TensorBoard writer that also logs to a run of Weights & Biases.

    Its mode is that of the package: WANDB_MODE=offline writes to OUTPUT_DIR/wandb alone.
    """

    def __init__(self, writer, args, is_resumed: bool):
        """
        Args:
            writer: torch's SummaryWriter.
            is_resumed: continue the run that ID_FILE names.
        """
        import wandb

        self.wandb, self.writer, self.log_dir = wandb, writer, writer.log_dir
        folder = Path(args.output_dir).resolve()
        file = folder / ID_FILE
        if not (is_resumed and file.exists()):
            file.write_text(f"{secrets.token_hex(4)}\n")
        self.run = wandb.init(
            project=args.wandb,
            dir=folder,
            name=folder.name,
            id=file.read_text().strip(),
            resume="allow",
            config=plain_args(args),
        )
        self.run.define_metric("*", step_metric="epoch_1000x")
        self.run.define_metric("perf/*", step_metric="epoch")

    def log(self, tag: str, value, step: int) -> None:
        axis = "epoch" if tag.startswith("perf/") else "epoch_1000x"
        self.run.log({tag: value, axis: step})

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.writer.add_scalar(tag, value, step)
        self.log(tag, value, step)

    def add_image(self, tag: str, image, step: int) -> None:
        """image: uint8 (3, height, width)."""
        self.writer.add_image(tag, image, step)
        self.log(tag, self.wandb.Image(image.transpose(1, 2, 0)), step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.run.finish()
        self.writer.close()
