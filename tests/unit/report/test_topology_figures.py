"""Drawings of networks: every kind of fabric, whole or in pieces."""

from __future__ import annotations

import numpy as np
import pytest
from network_cases import FABRICS, fabric

from moesim.report.topology_figures import topology_figure
from moesim.structure.topology_pieces import representative_piece


@pytest.mark.parametrize("name", FABRICS)
def test_no_two_vertices_stand_at_the_same_place_and_every_link_is_drawn(name):
    topology = fabric(name)
    piece = representative_piece(topology)
    figure = topology_figure(topology, piece)
    markers = [trace for trace in figure.data if "markers" in trace.mode]
    places = np.concatenate([np.stack((trace.x, trace.y), axis=1) for trace in markers])
    assert len(np.unique(places.round(6), axis=0)) == len(topology.vertex_names)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    drawn = sum(int(np.isnan(np.asarray(trace.x, dtype=float)).sum()) for trace in lines)
    assert drawn == len(topology.links) / 2


@pytest.mark.parametrize("name", ["rails", "torus of two cores", "half closed", "oversubscribed pods"])
def test_a_piece_of_a_network_is_no_larger_than_asked_and_hangs_together(name):
    import networkx as nx

    topology = fabric(name)
    piece = representative_piece(topology, most=20)
    assert not piece.is_whole
    assert 2 <= len(piece.vertices) <= 20
    assert nx.is_strongly_connected(topology.graph.subgraph(piece.vertices.tolist()))
