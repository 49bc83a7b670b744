from concurrent.futures import ThreadPoolExecutor

from torch._inductor import cudagraph_trees  # here, in another thread than the one that asks for trees below

from deploy.runtime.graph_trees import own_trees


def test_a_thread_that_did_not_import_the_trees_has_its_own() -> None:
    def trees() -> object:
        return cudagraph_trees.get_obj(cudagraph_trees.local, "tree_manager_containers")

    with ThreadPoolExecutor(1, initializer=own_trees) as recorder:
        first, again = recorder.submit(trees).result(), recorder.submit(trees).result()
    assert first == {}
    assert first is again
    assert first is not trees()
