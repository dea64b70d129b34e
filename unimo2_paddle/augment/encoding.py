"""Embeddings of pictures and texts by one of our own models; what needs Paddle is only here."""


def encoder(directory, kind):
    """(function: list of encoded pictures or of texts -> contrastive features float32 [n, H], fingerprint of the model).

    Args:
        directory: a retrieval or pre-trained model, see ``Predictor``; kind: "images" or "texts".

    Raises:
        CheckpointError: no such model; UserInputError: a model of another task.
    """
    from unimo2_paddle.runtime import import_paddle

    import_paddle()
    from unimo2_paddle.serving.index import RetrievalIndex, require_retrieval
    from unimo2_paddle.serving.predictor import Predictor

    predictor = Predictor(directory)
    require_retrieval(predictor)
    return lambda items: RetrievalIndex.build(predictor, kind, items).features, predictor.kind.fingerprint()
