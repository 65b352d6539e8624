//! OpenAI's Chat Completions, as vLLM, llama.cpp and Ollama speak it too: `POST
//! /v1/chat/completions`.

use super::{Field, Shape, Union, drop, keep, need, own, refuse};

/// `POST /v1/chat/completions`
pub const CHAT: &[Field] = &[
    own("model"),
    own("max_tokens"),
    own("max_completion_tokens"),
    own("stream"),
    own("stream_options"),
    own("n"),
    need("messages", Shape::List(&MESSAGE)),
    keep("tools", Shape::List(&TOOL)),
    keep("tool_choice", TOOL_CHOICE),
    keep("parallel_tool_calls", Shape::Bool),
    keep("response_format", RESPONSE_FORMAT),
    keep("temperature", Shape::Number),
    keep("top_p", Shape::Number),
    keep("top_k", Shape::Number),
    keep("min_p", Shape::Number),
    keep("frequency_penalty", Shape::Number),
    keep("presence_penalty", Shape::Number),
    keep("repetition_penalty", Shape::Number),
    keep("seed", Shape::Number),
    keep(
        "stop",
        Shape::Either(&[Shape::Text, Shape::List(&Shape::Text)]),
    ),
    keep("logprobs", Shape::Bool),
    keep("top_logprobs", Shape::Number),
    keep("logit_bias", Shape::Free),
    keep("reasoning_effort", Shape::Text),
    keep("verbosity", Shape::Text),
    keep("modalities", Shape::List(&Shape::Is(&["text"]))),
    drop("user"),
    drop("metadata"),
    drop("store"),
    drop("service_tier"),
    drop("safety_identifier"),
    drop("prompt_cache_key"),
    drop("prompt_cache_retention"),
    refuse(
        "web_search_options",
        "would let the provider search the web for the guest; not allowed here",
    ),
    refuse("audio", "spoken answers are not allowed here"),
    refuse("prediction", "predicted output is not allowed here"),
    refuse("functions", "use tools instead"),
    refuse("function_call", "use tool_choice instead"),
];

const MESSAGE: Shape = Shape::Union(&Union {
    tag: "role",
    absent: None,
    variants: &[
        ("system", INSTRUCTION),
        ("developer", INSTRUCTION),
        (
            "user",
            &[
                need("content", Shape::Either(&[Shape::Text, Shape::List(&PART)])),
                keep("name", Shape::Text),
            ],
        ),
        (
            "assistant",
            &[
                keep(
                    "content",
                    Shape::Either(&[Shape::Text, Shape::List(&ANSWER_PART)]),
                ),
                keep("refusal", Shape::Text),
                keep("name", Shape::Text),
                keep("reasoning_content", Shape::Text),
                keep("tool_calls", Shape::List(&TOOL_CALL)),
                // What SDKs and agents give back of an answer, and no provider needs.
                drop("annotations"),
                drop("provider_specific_fields"),
                drop("parsed"),
                refuse("audio", "spoken answers are not allowed here"),
                refuse("function_call", "use tool_calls instead"),
            ],
        ),
        (
            "tool",
            &[
                need("tool_call_id", Shape::Text),
                need("content", Shape::Either(&[Shape::Text, Shape::List(&TEXT)])),
                keep("name", Shape::Text),
            ],
        ),
    ],
    withheld: &[],
});

const INSTRUCTION: &[Field] = &[
    need("content", Shape::Either(&[Shape::Text, Shape::List(&TEXT)])),
    keep("name", Shape::Text),
];

const TEXT_PART: &[Field] = &[need("text", Shape::Text)];
const TEXT: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[("text", TEXT_PART)],
    withheld: &[],
});
const ANSWER_PART: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        ("text", TEXT_PART),
        ("refusal", &[need("refusal", Shape::Text)]),
    ],
    withheld: &[],
});
const PART: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        ("text", TEXT_PART),
        (
            "image_url",
            &[need(
                "image_url",
                Shape::Object(&[need("url", Shape::DataUrl), keep("detail", Shape::Text)]),
            )],
        ),
        (
            "input_audio",
            &[need(
                "input_audio",
                Shape::Object(&[need("data", Shape::Base64), need("format", Shape::Text)]),
            )],
        ),
        (
            "file",
            &[need(
                "file",
                Shape::Object(&[
                    need("file_data", Shape::DataUrl),
                    keep("filename", Shape::Text),
                    refuse("file_id", "a file at the provider cannot be used here"),
                ]),
            )],
        ),
    ],
    withheld: &[],
});

const TOOL_CALL: Shape = Shape::Union(&Union {
    tag: "type",
    absent: Some("function"),
    variants: &[
        (
            "function",
            &[
                need("id", Shape::Text),
                need(
                    "function",
                    Shape::Object(&[
                        need("name", Shape::Text),
                        need("arguments", Shape::Text),
                        drop("parsed_arguments"),
                    ]),
                ),
                drop("index"),
            ],
        ),
        (
            "custom",
            &[
                need("id", Shape::Text),
                need(
                    "custom",
                    Shape::Object(&[need("name", Shape::Text), need("input", Shape::Text)]),
                ),
            ],
        ),
    ],
    withheld: &[],
});

const TOOL: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        (
            "function",
            &[need(
                "function",
                Shape::Object(&[
                    need("name", Shape::Text),
                    keep("description", Shape::Text),
                    keep("parameters", Shape::Free),
                    keep("strict", Shape::Bool),
                ]),
            )],
        ),
        (
            "custom",
            &[need(
                "custom",
                Shape::Object(&[
                    need("name", Shape::Text),
                    keep("description", Shape::Text),
                    keep("format", Shape::Free),
                ]),
            )],
        ),
    ],
    withheld: &["web_search*", "code_interpreter", "file_search", "mcp"],
});

const NAMED: Shape = Shape::Object(&[need("name", Shape::Text)]);
const TOOL_CHOICE: Shape = Shape::Either(&[
    Shape::Is(&["none", "auto", "required"]),
    Shape::Union(&Union {
        tag: "type",
        absent: None,
        variants: &[
            ("function", &[need("function", NAMED)]),
            ("custom", &[need("custom", NAMED)]),
        ],
        withheld: &[],
    }),
]);

const RESPONSE_FORMAT: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        ("text", &[]),
        ("json_object", &[]),
        ("json_schema", &[need("json_schema", Shape::Free)]),
    ],
    withheld: &[],
});
