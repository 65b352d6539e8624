"""A model for mini-swe-agent by OpenAI's SDK: its own way, litellm, takes minutes to import in an emulated guest.

It is what `mini --model-class` is for; the agent, its commands and its command line are as they come from PyPI.
"""

import openai
from minisweagent.models.utils import actions_toolcall
from pydantic import BaseModel


class Config(BaseModel):
    model_name: str
    observation_template: str = "<returncode>{{output.returncode}}</returncode>\n<output>\n{{output.output}}</output>"
    format_error_template: str = "{{ error }}"


class Model:
    def __init__(self, **config):
        self.config = Config(**{name: value for name, value in config.items() if name in Config.model_fields})
        self.client = openai.OpenAI()

    def query(self, messages, **_):
        sent = [{name: value for name, value in message.items() if name != "extra"} for message in messages]
        answer = self.client.chat.completions.create(
            model=self.config.model_name, messages=sent, tools=[actions_toolcall.BASH_TOOL])
        choice = answer.choices[0]
        actions = actions_toolcall.parse_toolcall_actions(
            choice.message.tool_calls, format_error_template=self.config.format_error_template,
            template_kwargs={"finish_reason": choice.finish_reason})
        message = choice.message.model_dump(exclude_none=True)
        return {**message, "extra": {"actions": actions, "cost": 0.0}}

    def format_message(self, **message):
        return message

    def format_observation_messages(self, message, outputs, template_vars=None):
        return actions_toolcall.format_toolcall_observation_messages(
            actions=message["extra"]["actions"], outputs=outputs, template_vars=template_vars,
            observation_template=self.config.observation_template)

    def get_template_vars(self, **_):
        return self.config.model_dump()

    def serialize(self):
        return {"info": {"config": {"model": self.config.model_dump(mode="json")}}}
