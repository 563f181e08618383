"""Read frames from a video file with PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmcompile.errors import MMCompileError

if TYPE_CHECKING:
    from av.container import InputContainer


class VideoError(MMCompileError):
    """A video cannot be read. The message names the file and says what to do, in one line."""


def read_frames(path: str | Path, count: int | None = None) -> torch.Tensor:
    """Decode a video and keep `count` frames spread evenly over it, the first one among them.

    Only the kept frames are converted and held, so memory goes with `count`, not with the film's length.

    Args:
        path: a file in any container and codec that FFmpeg decodes.
        count: frames to keep; None, or more than the video has, keeps all.

    Returns:
        uint8 `[frames, height, width, 3]`, RGB, in order of time.

    Raises:
        VideoError: no such file, no video in it, damaged, or PyAV is not installed.
        ValueError: `count` is not positive.
    """
    if count is not None and count < 1:
        raise ValueError(f"count={count}: at least one frame must be kept")
    with _open(Path(path)) as container:
        total = _frame_count(container, path)
    keep = even_indices(total, min(count or total, total))
    with _open(Path(path)) as container:
        frames = _decode(container, path, keep)
    if not frames:
        raise VideoError(f"{path}: no frame could be decoded; is the file damaged or cut short?")
    return torch.stack(frames)  # [T, H, W, 3]


def even_indices(total: int, count: int) -> list[int]:
    """`count` rising frame numbers spread evenly over `total`, starting at 0."""
    return [index * total // count for index in range(count)]


def _open(path: Path) -> InputContainer:
    try:
        import av
    except ImportError as error:
        raise VideoError(
            'reading a video needs PyAV, which is not installed: pip install "mmcompile[video]"'
        ) from error
    if not path.exists():
        raise VideoError(f"{path}: no such file; give the path of a video (mp4, mkv, webm, ...)")
    if not path.is_file():
        raise VideoError(f"{path}: is not a file; give the path of one video")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: not a video that FFmpeg can open ({error.strerror})") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path}: has no video stream; is it sound only?")
    return container


def _frame_count(container: InputContainer, path: str | Path) -> int:
    """Frames in the file: counted by decoding where the container does not say."""
    import av

    stated = container.streams.video[0].frames
    if stated > 0:
        return stated
    try:
        return sum(1 for _ in container.decode(video=0))
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: cannot be decoded ({error.strerror})") from error


def _decode(container: InputContainer, path: str | Path, keep: list[int]) -> list[torch.Tensor]:
    import av

    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    wanted = set(keep)
    frames: list[torch.Tensor] = []
    try:
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                # One size for all: a stream may change its own on the way.
                picture = frame.to_ndarray(format="rgb24", width=stream.width, height=stream.height)
                frames.append(torch.from_numpy(picture))  # [H, W, 3]
            if len(frames) == len(keep):
                break
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: cannot be decoded ({error.strerror})") from error
    return frames
