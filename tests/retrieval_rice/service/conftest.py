"""A service of a tiny model and a shop of coloured pictures."""

from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")


@pytest.fixture
def make_service(make_index_model, index_processor, make_shop_rows, tmp_path):
    """A function that starts a service; its client, its `Service` and rows."""
    from contextlib import ExitStack

    from starlette.testclient import TestClient

    from retrieval_rice.index import GalleryIndex
    from retrieval_rice.recogniser import Recogniser
    from retrieval_rice.service.app import build_app
    from retrieval_rice.service.work import Service

    with ExitStack() as stack:

        def make(token=None, max_requests=32, model_settings=None, **settings):
            # An untrained decoder knows nothing, so the embedding decides.
            model = make_index_model(**{"fusion_weight": 0.01, **(model_settings or {})})
            rows = make_shop_rows()
            built = GalleryIndex.build(
                model, index_processor, rows, progress=False, output_dir=str(tmp_path / "shop.index")
            )
            recogniser = Recogniser(model, index_processor, built)
            service = Service(recogniser, **settings)
            client = stack.enter_context(
                TestClient(build_app(service, token, max_requests), raise_server_exceptions=False)
            )
            return SimpleNamespace(client=client, service=service, rows=rows, recogniser=recogniser, index=built)

        yield make
