"""Draw `moving_shapes.mp4`, the video of the demo: textured shapes that move over a textured ground.

    python examples/make_video.py [OUT.mp4]

Frame by frame the picture changes the way filmed scenes do: most of it stays, some of it moves, and twice the
scene is cut. Nothing in it is random, so the file can be made again at any time.
"""

import math
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH = 480, 640
FRAMES = 64
RATE = 8
CUTS = (27, 48)


def draw(frame: int) -> np.ndarray:
    """One picture, uint8 `[HEIGHT, WIDTH, 3]`."""
    scene = sum(frame >= cut for cut in CUTS)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    ground = 0.5 + 0.22 * np.sin(x / (20 + 8 * scene) + 0.6 * scene) * np.cos(y / (28 - 6 * scene))
    tint = np.array([(0.55, 0.75, 0.95), (0.95, 0.8, 0.55), (0.65, 0.95, 0.7)][scene])
    picture = ground[..., None] * tint
    time = frame / RATE
    for shape in range(3):
        angle = time * (0.7 + 0.35 * shape) + 2.1 * shape + scene
        centre_x = WIDTH * (0.5 + 0.30 * math.cos(angle))
        centre_y = HEIGHT * (0.5 + 0.28 * math.sin(angle * (1 + 0.25 * shape)))
        radius = 48 + 20 * shape
        u, v = x - centre_x, y - centre_y
        inside = (
            u * u + v * v < radius * radius,
            abs(u) + abs(v) < radius,
            np.maximum(abs(u), abs(v)) < radius,
        )[shape]
        across = u * math.cos(angle) + v * math.sin(angle)
        stripes = 0.6 + 0.4 * np.sign(np.sin(across / (5.5 + 2 * shape)))
        colour = np.roll(np.array([0.95, 0.35, 0.2]), shape + scene)
        picture = np.where(inside[..., None], stripes[..., None] * colour, picture)
    return (picture.clip(0, 1) * 255).astype(np.uint8)


def write(path: Path) -> None:
    """Encode all frames as H.264 in an mp4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE), options={"crf": "26", "preset": "veryslow"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(frame), format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("moving_shapes.mp4")
    write(target)
    print(f"{target}: {FRAMES} frames of {WIDTH} x {HEIGHT}, {target.stat().st_size / 1024:.0f} KiB")
