"""A front as it is drawn: every point by its kind, and what the head was given."""

from mmcompile.kernels.patterns import HeadPattern
from mmcompile.pictures.front_curve import draw_front
from mmcompile.tables import FrontPoint, HeadFinding


def test_every_point_and_the_chosen_one_are_drawn():
    grid, columns = HeadPattern("grid"), HeadPattern("columns", columns=64)
    front = (FrontPoint(grid, 1.0, 0.1, 0.4), FrontPoint(columns, 2.0, 0.2, 0.3), FrontPoint(grid, 3.0, 0.4, 0.1))
    figure = draw_front(HeadFinding(0.3, 0.2, 2.0, front=front), columns, "layer 0, head 1")
    (axis,) = figure.axes
    of_grid, of_columns, chosen = ([tuple(at) for at in one.get_offsets().tolist()] for one in axis.collections)
    assert of_grid == [(1.0, 0.4), (3.0, 0.1)] and of_columns == chosen == [(2.0, 0.3)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["grid", "columns", "chosen:\ncolumns"]
