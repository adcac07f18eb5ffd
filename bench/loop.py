"""The scoring loop beside the bare consume-produce-commit of the same transactions.

Starts an Apache Kafka and a Valkey of its own, fills them (users, items, vectors, a first part of
the events), and then measures in turn, each time on new events: the scoring loop, exactly-once, and
a loop that reads the same input, writes the records that the scoring loop wrote, in transactions of
the same size, and does nothing else. Prints a table and writes `bench/results/loop.json`.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from confluent_kafka import Consumer, Message, Producer
from pydantic import SecretStr

from bench import report
from bench.events import World, make_events, make_world
from bench.model import default_models
from model import encoder
from model.catalog import item_text
from model.ids import hash_ids
from model.state import LAYOUT_HASH
from schemas.exceptions import StarcastError
from starcast.log import LogConfig, set_up_logging
from streams.admin import apply_topics, client_config
from streams.catalog import Catalog
from streams.config import (
    ArchiveConfig,
    KafkaConfig,
    ModelsConfig,
    RedisConfig,
    ScorerConfig,
    StatesConfig,
)
from streams.items import Items
from streams.loop import Loop, Outcome, Position, Processor
from streams.metrics import Metrics, make_metrics
from streams.models import Models
from streams.producer import Outgoing, play
from streams.reader import VECTOR_DTYPE, Reader, vector_keys
from streams.scorer import Scorer
from streams.store import Store
from streams.user_states import UserStates
from tests.servers import servers
