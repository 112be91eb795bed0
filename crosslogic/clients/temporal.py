"""Temporal: the connection, strict decoding of what operators send, and the one way to run our workflows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import temporalio.api.common.v1 as common_api
import temporalio.api.enums.v1 as enums_api
import temporalio.api.operatorservice.v1 as operator_api
import temporalio.client
import temporalio.converter
import temporalio.worker
from temporalio import workflow
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode, TLSConfig
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from crosslogic.contracts.inputs import INPUT_TYPES, WORKFLOW_INPUTS, Refused, explain, read_input
from crosslogic.contracts.names import SEARCH_ATTRIBUTES, SIGNALS_WITH_A_REASON
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.settings import Settings

# Loaded once, outside the sandbox: they are deterministic or are only looked at for their signatures, and loading them
# again for each workflow would trip the deadlock detector, which allows 2 s.
# redis: its finalizers import, and the garbage collector may run them in a workflow's thread.
PASSED_THROUGH = ("crosslogic.domain", "crosslogic.contracts", "activities", "redis", "hiredis")


class StrictPayloadConverter(temporalio.converter.CompositePayloadConverter):
    """Temporal's own converter, but the input of a workflow is taken exactly or becomes `Refused`.

    An exception here would leave the workflow running for ever with failing tasks; `StrictInputs` fails it instead.
    """

    def __init__(self) -> None:
        super().__init__(*temporalio.converter.DefaultPayloadConverter.default_encoding_payload_converters)

    def from_payloads(self, payloads: Sequence[common_api.Payload], type_hints: list[type] | None = None) -> list[Any]:
        """Decode; workflow inputs, and whatever came without a type, never raise."""
        hints: list[Any] = list(type_hints) if type_hints else [None] * len(payloads)
        values: list[Any] = []
        for payload, hint in zip(payloads, hints, strict=True):
            if hint in INPUT_TYPES:
                values.append(_read_input(payload, hint))
            elif hint is None or hint is Any:
                values.append(self._read_anything(payload))
            else:
                values += super().from_payloads([payload], [hint])
        return values

    def _read_anything(self, payload: common_api.Payload) -> Any:
        try:
            return super().from_payloads([payload])[0]
        except Exception as error:
            return Refused(f"a payload cannot be read ({error})")


def _read_input(payload: common_api.Payload, hint: type[Any]) -> Any:
    encoding = payload.metadata.get("encoding", b"").decode(errors="replace")
    if encoding == "binary/null":
        return read_input(hint, None)
    if encoding != "json/plain":
        return Refused(f"its input is encoded as {encoding or 'nothing known'!r} and must be json/plain")
    try:
        value = json.loads(payload.data)
    except ValueError as error:
        return Refused(f"its input is not JSON ({error})")
    return read_input(hint, value)


class StrictInputs(temporalio.client.Interceptor, temporalio.worker.Interceptor):
    """Fails a workflow at once whose input was refused, and lets no signal's payload hurt a running one.

    Given to the client, it goes to every worker of that client by itself.
    """

    def workflow_interceptor_class(
        self, input: temporalio.worker.WorkflowInterceptorClassInput
    ) -> type[temporalio.worker.WorkflowInboundInterceptor] | None:
        """Goes around each workflow instance."""
        return _StrictInbound


class _StrictInbound(temporalio.worker.WorkflowInboundInterceptor):
    async def execute_workflow(self, input: temporalio.worker.ExecuteWorkflowInput) -> Any:
        name = workflow.info().workflow_type
        known = WORKFLOW_INPUTS.get(name)
        problem = _problem(known.type, input.args) if known else None
        if problem is not None:
            if workflow.info().continued_run_id is not None:
                # We wrote it ourselves, in a newer version: the task is retried until one of its workers has it.
                raise RuntimeError(explain(name, problem))
            raise ApplicationError(explain(name, problem), type="BadInput", non_retryable=True)
        return await super().execute_workflow(input)

    async def handle_signal(self, input: temporalio.worker.HandleSignalInput) -> None:
        # Handlers take a reason or nothing. The signal is the nudge; what cannot be used of its payload is left out.
        reasons = [value for value in input.args[:1] if isinstance(value, str)]
        accepted = reasons if input.signal in SIGNALS_WITH_A_REASON else []
        if len(accepted) != len(input.args):
            workflow.logger.warning("signal %s came with a payload that was ignored", input.signal)
        await super().handle_signal(dataclasses.replace(input, args=accepted))


def _problem(expected: type[Any], args: Sequence[Any]) -> str | None:
    if not args:
        return "it was given no input"
    if len(args) > 1:
        return f"it was given {len(args)} inputs and takes one"
    value = args[0]
    if isinstance(value, Refused):
        return value.reason
    return None if isinstance(value, expected) else f"its input is no {expected.__name__}"


DATA_CONVERTER = dataclasses.replace(
    temporalio.converter.DataConverter.default, payload_converter_class=StrictPayloadConverter
)


def interceptors() -> list[StrictInputs]:
    """What goes around every workflow: for the client (whose workers inherit it) and the replayer."""
    return [StrictInputs()]


def workflow_runner() -> SandboxedWorkflowRunner:
    """The one sandbox of worker, replayer and tests."""
    return SandboxedWorkflowRunner(restrictions=SandboxRestrictions.default.with_passthrough_modules(*PASSED_THROUGH))


async def connect(settings: Settings) -> temporalio.client.Client:
    """A client for the configured namespace, self-hosted (plain, TLS, mTLS) or Temporal Cloud (API key).

    Raises Unavailable when the server cannot be reached now. Once connected it reconnects by itself.
    """
    api_key = settings.temporal_api_key
    try:
        return await temporalio.client.Client.connect(
            settings.temporal_address,
            namespace=settings.temporal_namespace,
            tls=_tls(settings),
            api_key=api_key.get_secret_value() if api_key else None,
            data_converter=DATA_CONVERTER,
            interceptors=interceptors(),
        )
    except (RuntimeError, OSError, RPCError) as error:
        raise Unavailable(
            f"Temporal cannot be reached at {settings.temporal_address} ({str(error)[:200]}). Does it run? "
            "Check CROSSLOGIC_TEMPORAL_ADDRESS and the TLS settings."
        ) from error


def _tls(settings: Settings) -> TLSConfig | bool:
    cert, key, ca = settings.temporal_tls_cert, settings.temporal_tls_key, settings.temporal_tls_ca
    if (cert is None) != (key is None):
        raise Rejected("Set both CROSSLOGIC_TEMPORAL_TLS_CERT and CROSSLOGIC_TEMPORAL_TLS_KEY, or neither.")
    if cert is None and ca is None:
        return settings.temporal_tls or settings.temporal_api_key is not None
    try:
        return TLSConfig(
            server_root_ca_cert=ca.read_bytes() if ca else None,
            client_cert=cert.read_bytes() if cert else None,
            client_private_key=key.read_bytes() if key else None,
        )
    except OSError as error:
        raise Rejected(f"Cannot read a TLS file of Temporal's settings: {error}.") from error


async def ensure_search_attributes(client: temporalio.client.Client, namespace: str) -> list[str]:
    """Register the search attributes that are missing and return their names.

    Raises Rejected, saying what to do by hand, where the server does not let us (Temporal Cloud, for example), and
    Unavailable when it does not answer.
    """
    keyword = enums_api.IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    try:
        known = await client.operator_service.list_search_attributes(
            operator_api.ListSearchAttributesRequest(namespace=namespace)
        )
        wrong = [name for name in SEARCH_ATTRIBUTES if known.custom_attributes.get(name, keyword) != keyword]
        if wrong:
            raise Rejected(f"Search attribute {wrong[0]} exists with another type than Keyword: remove or rename it.")
        missing = [name for name in SEARCH_ATTRIBUTES if name not in known.custom_attributes]
        if missing:
            await client.operator_service.add_search_attributes(
                operator_api.AddSearchAttributesRequest(
                    namespace=namespace, search_attributes=dict.fromkeys(missing, keyword)
                )
            )
        return missing
    except RPCError as error:
        if error.status is RPCStatusCode.ALREADY_EXISTS:
            return []
        if error.status in (
            RPCStatusCode.PERMISSION_DENIED,
            RPCStatusCode.UNIMPLEMENTED,
            RPCStatusCode.UNAUTHENTICATED,
        ):
            names = " ".join(f"--name {name} --type Keyword" for name in SEARCH_ATTRIBUTES)
            raise Rejected(
                f"This Temporal does not let us register search attributes ({error.status.name}). Create them "
                f"yourself: `temporal operator search-attribute create --namespace {namespace} {names}`, in Temporal "
                "Cloud under Namespaces → Edit → Custom Search Attributes (type Keyword), and run the set-up again."
            ) from error
        raise Unavailable(f"Temporal did not register the search attributes: {error.message}") from error


@dataclasses.dataclass(frozen=True)
class Standing:
    """A workflow that a schedule starts again and again. What an outage made it miss is done once, afterwards."""

    schedule_id: str
    workflow: str
    input: Any
    every: timedelta
    note: str


async def ensure_schedules(client: temporalio.client.Client, schedules: Sequence[Standing], task_queue: str) -> None:
    """Make the schedules that are missing; one that exists stays as an operator may have changed it.

    Raises Unavailable when Temporal does not answer.
    """
    for one in schedules:
        schedule = temporalio.client.Schedule(
            action=temporalio.client.ScheduleActionStartWorkflow(
                one.workflow, one.input, id=one.schedule_id, task_queue=task_queue
            ),
            spec=temporalio.client.ScheduleSpec(
                intervals=[temporalio.client.ScheduleIntervalSpec(every=one.every)],
                jitter=min(one.every / 10, timedelta(minutes=30)),
            ),
            policy=temporalio.client.SchedulePolicy(
                overlap=temporalio.client.ScheduleOverlapPolicy.SKIP, catchup_window=one.every
            ),
            state=temporalio.client.ScheduleState(note=one.note),
        )
        try:
            await client.create_schedule(one.schedule_id, schedule, trigger_immediately=True)
        except temporalio.client.ScheduleAlreadyRunningError:
            continue
        except RPCError as error:
            raise Unavailable(f"Temporal did not make the schedule {one.schedule_id}: {error.message}") from error
