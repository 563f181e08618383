"""Colours that people who see colours differently can tell apart (Okabe and Ito), and names of modalities."""

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000",
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
)
GREY = "#9a9a9a"
DARK = (BLACK, BLUE)  # under white letters; the others take black ones

KINDS = {
    "dense": BLACK,
    "a_shape": SKY,
    "tri_shape": BLUE,
    "sf_fixed": PURPLE,
    "sf_strided": YELLOW,
    "vertical_slash": ORANGE,
    "grid": GREEN,
    "top_p": VERMILLION,
    "columns": GREY,
}

_MODALITIES = (("text", GREY), ("image", ORANGE), ("video", GREEN), ("audio", PURPLE))


def modality_name(modality: int) -> str:
    """As it stands in legends."""
    return _MODALITIES[modality][0] if modality < len(_MODALITIES) else f"modality {modality}"


def modality_colour(modality: int) -> str:
    """A hex colour; those without a name share one."""
    return _MODALITIES[modality][1] if modality < len(_MODALITIES) else SKY
