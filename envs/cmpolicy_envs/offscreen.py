"""Images of a MuJoCo model without a window: EGL, OSMesa (software) or, on macOS, CGL.

The variable MUJOCO_GL=osmesa asks for OSMesa; else EGL is taken where its library is installed.
A process has one OpenGL context, which all renderers share.
"""

import atexit
import ctypes.util
import os
import sys
from functools import lru_cache
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

_MAX_GEOMS = 10_000
_HELP = (
    "On Debian and Ubuntu `apt-get install libosmesa6`, then MUJOCO_GL=osmesa, gives one in "
    "software; `apt-get install libegl1 libgl1-mesa-dri`, or the driver of a GPU, gives EGL."
)


class OpenGLError(RuntimeError):
    """There is no OpenGL to render with; the message says which package gives one."""


class OffscreenRenderer:
    """Renders the cameras of one model.

    Args:
        model: what to render; its off-screen buffer is enlarged to ``size``.
        size: largest height and width of an image, px.

    Raises:
        OpenGLError: no OpenGL; says which package gives one.
    """

    def __init__(self, model: mujoco.MjModel, size: int) -> None:
        self._gl = _context()
        self._gl.make_current()
        self._model = model
        buffer = model.vis.global_
        buffer.offwidth = max(buffer.offwidth, size)
        buffer.offheight = max(buffer.offheight, size)
        self._scene = mujoco.MjvScene(model, _MAX_GEOMS)
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._options = mujoco.MjvOption()
        # robosuite: group 0 are the shapes that collide, group 1 those to be seen.
        self._options.geomgroup[0] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(self, data: mujoco.MjData, camera: str, size: int) -> Image:
        """Image (size, size, 3), RGB, top row first."""
        self._gl.make_current()
        self._camera.fixedcamid = camera_id(self._model, camera)
        mujoco.mjv_updateScene(
            self._model,
            data,
            self._options,
            None,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL.value,
            self._scene,
        )
        view = mujoco.MjrRect(0, 0, size, size)
        image = np.empty((size, size, 3), dtype=np.uint8)
        mujoco.mjr_render(view, self._scene, self._context)
        mujoco.mjr_readPixels(image, None, view, self._context)
        return np.ascontiguousarray(image[::-1])  # OpenGL gives the bottom row first

    def close(self) -> None:
        """Free what the graphics card holds of the model."""
        self._gl.make_current()
        self._context.free()


def camera_id(model: mujoco.MjModel, camera: str) -> int:
    """Number of a camera; ValueError lists the known ones."""
    number = int(mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA.value, camera))
    if number < 0:
        known = ", ".join(model.camera(i).name for i in range(model.ncam))
        raise ValueError(f"there is no camera {camera!r}; known: {known}")
    return number


def project(
    model: mujoco.MjModel, data: mujoco.MjData, camera: str, points: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """Where points (..., 3), m in the world, lie on an image of ``size``: (..., 2) x, y px."""
    number = camera_id(model, camera)
    seen = (points - data.cam_xpos[number]) @ data.cam_xmat[number].reshape(3, 3)
    # The camera looks along -z, with x to the right and y up.
    depth = np.maximum(-seen[..., 2], 1e-6)
    focal = 0.5 * size / np.tan(np.deg2rad(model.cam_fovy[number]) / 2)
    x, y = seen[..., 0] / depth, -seen[..., 1] / depth
    return np.stack([x, y], axis=-1) * focal + 0.5 * size


@lru_cache(maxsize=1)
def _context() -> Any:
    """The OpenGL context of this process."""
    kind = _kind()
    # PyOpenGL decides at its first import, once for the process.
    os.environ.setdefault("PYOPENGL_PLATFORM", kind)
    try:
        if kind == "egl":
            from mujoco.egl import GLContext
        elif kind == "osmesa":
            from mujoco.osmesa import GLContext
        else:
            from mujoco.cgl import GLContext
        # The size is that of OSMesa's own frame; images are read from a buffer of their own.
        context = GLContext(1024, 1024)
        context.make_current()
    except Exception as error:  # whatever the driver, PyOpenGL and mujoco raise
        raise OpenGLError(
            f"cannot render: no off-screen OpenGL through {kind} ({_line(error)}). {_HELP}"
        ) from error
    # Before mujoco's own exit handler ends the display.
    atexit.register(context.free)
    return context


def _kind() -> str:
    if sys.platform == "darwin":
        return "cgl"
    # robosuite sets MUJOCO_GL=egl when it is imported, unless it is osmesa: egl says nothing.
    if os.environ.get("MUJOCO_GL", "").lower() == "osmesa":
        return "osmesa"
    for kind, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library) is not None:
            return kind
    raise OpenGLError(f"cannot render: neither EGL nor OSMesa is installed. {_HELP}")


def _line(error: Exception) -> str:
    try:
        text = str(error).strip()
    except Exception:  # PyOpenGL's errors cannot always be printed
        text = ""
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
