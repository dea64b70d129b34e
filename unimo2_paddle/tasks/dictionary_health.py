"""A look at the dictionary of grounded tokens during pre-training: which codes are used, and do picture and sentence choose the same."""
import os

import numpy as np
import paddle

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.metrics.dictionary import dictionary_health
from unimo2_paddle.tasks.reporting import write_json
from unimo2_paddle.tasks.retrieval_scoring import encode_captions, encode_pictures, evaluation_mode


def has_code_choice(model_config):
    """Whether a model chooses K codes per picture, sentence or pair, so that choices can be compared."""
    return model_config.model_type == "grounded" and model_config.grounding_method == "topk"


class DictionaryHealth:
    """:func:`~unimo2_paddle.metrics.dictionary.dictionary_health` of the first pictures of a data set, each with its first sentence.

    Args:
        dataset: a ``RetrievalDataset``; pairs: at most so many of its pictures; every_steps: how often during training.
    """

    name = "dictionary"

    def __init__(self, dataset, pairs=128, every_steps=0, batch_size=64):
        self.dataset, self.pairs, self.every_steps, self.batch_size = dataset, min(pairs, len(dataset)), every_steps, batch_size
        self.metrics = None

    def run(self, model):
        """The figures as a dict of floats; the model's mode is restored.

        Raises:
            UserInputError: the model has no dictionary it chooses K codes from.
        """
        if not has_code_choice(model.config):
            raise UserInputError("the use of a dictionary can only be told of a grounded model with grounding_method topk")
        first = np.searchsorted(self.dataset.text_image, np.arange(self.pairs))  # captions of a picture stand in a row
        joint, image, text = [], [], []
        with evaluation_mode(model):
            for start in range(0, self.pairs, self.batch_size):
                end = min(start + self.batch_size, self.pairs)
                pixels = paddle.to_tensor(self.dataset.pictures(start, end, model.config.image_size))
                pictures = encode_pictures(model, pixels).code_scores
                sentences = encode_captions(model, *(paddle.to_tensor(part) for part in self.dataset.text_batch(first[start:end]))).code_scores
                for chosen, scores in ((joint, pictures + sentences), (image, pictures), (text, sentences)):
                    chosen.append(model.dictionary.choose(scores)[1].numpy())
        self.metrics = dictionary_health(*(np.concatenate(chosen) for chosen in (joint, image, text)), model.config.num_codebook)
        return dict(self.metrics)

    def table(self):
        """The last run for the screen."""
        told = ", ".join(f"{name} {value:.2f}" for name, value in (self.metrics or {}).items())
        return f"dictionary of {self.pairs} pairs: {told or 'not run yet'}"

    def write_report(self, directory):
        """Write ``dictionary.json`` of the last run."""
        write_json(os.path.join(directory, "dictionary.json"), {"pairs": self.pairs, **(self.metrics or {})})
