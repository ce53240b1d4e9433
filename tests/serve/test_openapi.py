"""Answers are as the OpenAPI schema says, whatever it allows to ask.

schemathesis makes requests from the schema, and some that break it.
"""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from serve_support import KEY

HEADERS = {'Authorization': f'Bearer {KEY}'}
CHECKS = [
  not_a_server_error,
  checks.status_code_conformance,
  checks.content_type_conformance,
  checks.response_schema_conformance,
  checks.unsupported_method,
]


@pytest.fixture(scope='module')
def operations(address):
  schema = schemathesis.openapi.from_url(
    f'{address}/openapi.json', headers=HEADERS
  )
  return [found.ok() for found in schema.get_all_operations()]


@pytest.mark.parametrize('mode', GenerationMode)
def test_answers_are_as_documented(operations, mode):
  labels = set()
  for operation in operations:
    labels.add(operation.label)
    if mode.is_negative and not operation.body:
      continue

    @hypothesis.settings(
      max_examples=8,
      derandomize=True,
      database=None,
      deadline=None,
      suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
      case.call_and_validate(headers=HEADERS, timeout=60, checks=CHECKS)

    check()
  assert 'POST /v1/chat/completions' in labels and len(labels) == 10
