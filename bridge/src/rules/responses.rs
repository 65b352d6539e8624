//! OpenAI's Responses: `POST /v1/responses`. Nothing is kept at the provider (`store` is always
//! false), so each fork carries its own state.

use super::{Field, Shape, Union, drop, keep, need, own, refuse};

const STATE: &str = "state at the provider cannot be used here; send the items themselves";

/// `POST /v1/responses`
pub const RESPONSES: &[Field] = &[
    own("model"),
    own("max_output_tokens"),
    own("stream"),
    own("background"),
    need("input", Shape::Either(&[Shape::Text, Shape::List(&ITEM)])),
    keep("instructions", Shape::Text),
    keep("tools", Shape::List(&TOOL)),
    keep("tool_choice", TOOL_CHOICE),
    keep("parallel_tool_calls", Shape::Bool),
    keep("temperature", Shape::Number),
    keep("top_p", Shape::Number),
    keep("top_logprobs", Shape::Number),
    keep(
        "reasoning",
        Shape::Object(&[
            keep("effort", Shape::Text),
            keep("summary", Shape::Text),
            keep("context", Shape::Text),
        ]),
    ),
    keep(
        "text",
        Shape::Object(&[keep("format", FORMAT), keep("verbosity", Shape::Text)]),
    ),
    keep(
        "include",
        Shape::List(&Shape::Is(&[
            "reasoning.encrypted_content",
            "message.output_text.logprobs",
        ])),
    ),
    keep("truncation", Shape::Is(&["auto", "disabled"])),
    drop("store"),
    drop("stream_options"),
    drop("metadata"),
    drop("client_metadata"),
    drop("user"),
    drop("service_tier"),
    drop("safety_identifier"),
    drop("prompt_cache_key"),
    drop("prompt_cache_retention"),
    drop("max_tool_calls"),
    drop("context_management"),
    refuse("previous_response_id", STATE),
    refuse("conversation", STATE),
    refuse("prompt", STATE),
];

const ITEM: Shape = Shape::Union(&Union {
    tag: "type",
    absent: Some("message"),
    variants: &[
        (
            "message",
            &[
                need(
                    "role",
                    Shape::Is(&["user", "assistant", "system", "developer"]),
                ),
                need("content", Shape::Either(&[Shape::Text, Shape::List(&PART)])),
                keep("phase", Shape::Text),
                ID,
                STATUS,
            ],
        ),
        (
            "reasoning",
            &[
                need("summary", Shape::List(&SUMMARY)),
                keep("content", Shape::List(&SUMMARY)),
                keep("encrypted_content", Shape::Text),
                ID,
                STATUS,
            ],
        ),
        (
            "function_call",
            &[
                CALL_ID,
                need("name", Shape::Text),
                keep("namespace", Shape::Text),
                need("arguments", Shape::Text),
                // OpenAI's SDK for Node has read them, and gives that back, too.
                drop("parsed_arguments"),
                ID,
                STATUS,
            ],
        ),
        ("function_call_output", OUTPUT),
        (
            "custom_tool_call",
            &[
                CALL_ID,
                need("name", Shape::Text),
                keep("namespace", Shape::Text),
                need("input", Shape::Text),
                ID,
                STATUS,
            ],
        ),
        ("custom_tool_call_output", OUTPUT),
        (
            "local_shell_call",
            &[CALL_ID, need("action", Shape::Free), ID, STATUS],
        ),
        (
            "local_shell_call_output",
            &[
                keep("call_id", Shape::Text),
                need("output", Shape::Text),
                ID,
                STATUS,
            ],
        ),
        (
            "shell_call",
            &[
                CALL_ID,
                need("action", Shape::Free),
                keep("environment", LOCAL),
                ID,
                STATUS,
            ],
        ),
        (
            "shell_call_output",
            &[
                CALL_ID,
                need("output", Shape::Free),
                keep("max_output_length", Shape::Number),
                ID,
                STATUS,
            ],
        ),
        (
            "apply_patch_call",
            &[CALL_ID, need("operation", Shape::Free), ID, STATUS],
        ),
        (
            "apply_patch_call_output",
            &[CALL_ID, keep("output", Shape::Text), ID, STATUS],
        ),
        // Tools that are offered from here on: Codex has those of newer models here, and none in `tools`.
        (
            "additional_tools",
            &[
                need("role", Shape::Is(&["developer"])),
                need("tools", Shape::List(&TOOL)),
                ID,
            ],
        ),
    ],
    withheld: &[],
});

// The name of an item that the provider keeps, and it keeps none: calls are joined by `call_id`.
const ID: Field = drop("id");
const STATUS: Field = keep("status", Shape::Text);
const CALL_ID: Field = need("call_id", Shape::Text);
const OUTPUT: &[Field] = &[
    CALL_ID,
    need("output", Shape::Either(&[Shape::Text, Shape::List(&PART)])),
    ID,
    STATUS,
];

const PART: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        ("input_text", &[need("text", Shape::Text)]),
        (
            "output_text",
            &[
                need("text", Shape::Text),
                drop("annotations"),
                drop("logprobs"),
                drop("parsed"),
            ],
        ),
        ("refusal", &[need("refusal", Shape::Text)]),
        (
            "input_image",
            &[
                need("image_url", Shape::DataUrl),
                keep("detail", Shape::Text),
                refuse("file_id", STATE),
            ],
        ),
        (
            "input_file",
            &[
                need("file_data", Shape::DataUrl),
                keep("filename", Shape::Text),
                refuse("file_id", STATE),
                refuse("file_url", "the provider does not fetch for a guest"),
            ],
        ),
    ],
    withheld: &[],
});

const SUMMARY: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        ("summary_text", &[need("text", Shape::Text)]),
        ("reasoning_text", &[need("text", Shape::Text)]),
        ("text", &[need("text", Shape::Text)]),
    ],
    withheld: &[],
});

/// Where a shell's commands run: with us, never in a container of the provider's.
const LOCAL: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[("local", &[])],
    withheld: &[],
});

const FUNCTION: (&str, &[Field]) = (
    "function",
    &[
        need("name", Shape::Text),
        keep("description", Shape::Text),
        keep("parameters", Shape::Free),
        keep("strict", Shape::Bool),
    ],
);
const CUSTOM: (&str, &[Field]) = (
    "custom",
    &[
        need("name", Shape::Text),
        keep("description", Shape::Text),
        keep("format", Shape::Free),
    ],
);
const WITHHELD: &[&str] = &[
    "web_search*",
    "file_search",
    "code_interpreter",
    "computer*",
    "image_generation",
    "mcp",
    "tool_search",
];
const TOOL: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        FUNCTION,
        CUSTOM,
        ("local_shell", &[]),
        ("shell", &[need("environment", LOCAL)]),
        ("apply_patch", &[]),
        // A name before the names of functions; they run where all others do, with us.
        (
            "namespace",
            &[
                need("name", Shape::Text),
                keep("description", Shape::Text),
                need("tools", Shape::List(&NAMED)),
            ],
        ),
    ],
    withheld: WITHHELD,
});
const NAMED: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[FUNCTION, CUSTOM],
    withheld: WITHHELD,
});

const TOOL_CHOICE: Shape = Shape::Either(&[
    Shape::Is(&["none", "auto", "required"]),
    Shape::Union(&Union {
        tag: "type",
        absent: None,
        variants: &[
            ("function", &[need("name", Shape::Text)]),
            ("custom", &[need("name", Shape::Text)]),
            ("shell", &[]),
            ("apply_patch", &[]),
        ],
        withheld: &[],
    }),
]);

const FORMAT: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        ("text", &[]),
        ("json_object", &[]),
        (
            "json_schema",
            &[
                need("name", Shape::Text),
                need("schema", Shape::Free),
                keep("description", Shape::Text),
                keep("strict", Shape::Bool),
            ],
        ),
    ],
    withheld: &[],
});
