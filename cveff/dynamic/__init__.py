"""Dynamic networks: one training, many networks or many costs, chosen afterwards or image by image."""

from __future__ import annotations

from cveff.dynamic.elastic import Elastic
from cveff.dynamic.elastic_space import ElasticSpace, SubNet
from cveff.dynamic.extract import ExtractSubNet

__all__ = ["Elastic", "ElasticSpace", "ExtractSubNet", "SubNet"]
