"""No module imports another in a circle: not when it is imported, not in a function, not for its types."""

from __future__ import annotations

from functools import cache

import grimp


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """For each module that can be reached from itself, the shortest way there."""
    found = []
    for module in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            way = graph.find_shortest_chain(importer=imported, imported=module)
            if way is not None:
                found.append([module, *way])
    return found


@cache
def product() -> grimp.ImportGraph:
    return grimp.build_graph("instantrt", cache_dir=None)


def test_no_module_imports_another_in_a_circle() -> None:
    graph = product()
    assert len(graph.modules) > 100, "the whole product, not an empty folder"
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    """The one that would come of a staging that knows what a kit is."""
    graph = product()
    staging, kit = "instantrt.compiler.artifact.staging", "instantrt.compiler.backend.tensorrt.kit"
    assert graph.direct_import_exists(importer=kit, imported=staging)
    graph.add_import(importer=staging, imported=kit)
    try:
        assert [staging, kit, staging] in circles(graph)
    finally:
        graph.remove_import(importer=staging, imported=kit)
