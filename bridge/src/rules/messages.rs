//! Anthropic's Messages: `POST /v1/messages` and `/v1/messages/count_tokens`.

use super::{Field, Shape, Union, drop, keep, need, own, refuse};

const PROVIDER_SIDE: &str = "would let the provider act for the guest; not allowed here";

/// `POST /v1/messages`
pub const MESSAGES: &[Field] = &[
    own("model"),
    own("max_tokens"),
    own("stream"),
    need("messages", Shape::List(&MESSAGE)),
    keep("system", SYSTEM),
    keep("temperature", Shape::Number),
    keep("top_p", Shape::Number),
    keep("top_k", Shape::Number),
    keep("stop_sequences", Shape::List(&Shape::Text)),
    keep("tools", Shape::List(&TOOL)),
    keep("tool_choice", TOOL_CHOICE),
    keep("thinking", THINKING),
    keep("output_config", OUTPUT_CONFIG),
    keep("cache_control", CACHE_CONTROL),
    drop("metadata"),
    drop("service_tier"),
    drop("context_management"),
    drop("inference_geo"),
    drop("speed"),
    refuse("mcp_servers", PROVIDER_SIDE),
    refuse("container", PROVIDER_SIDE),
];

/// `POST /v1/messages/count_tokens`
pub const COUNT_TOKENS: &[Field] = &[
    own("model"),
    need("messages", Shape::List(&MESSAGE)),
    keep("system", SYSTEM),
    keep("tools", Shape::List(&TOOL)),
    keep("tool_choice", TOOL_CHOICE),
    keep("thinking", THINKING),
    keep("output_config", OUTPUT_CONFIG),
    keep("cache_control", CACHE_CONTROL),
    drop("context_management"),
    drop("speed"),
    refuse("mcp_servers", PROVIDER_SIDE),
];

const MESSAGE: Shape = Shape::Object(&[
    // `system` in the middle of a conversation is what newer programs say of their surroundings.
    need("role", Shape::Is(&["user", "assistant", "system"])),
    need(
        "content",
        Shape::Either(&[Shape::Text, Shape::List(&BLOCK)]),
    ),
]);

const TEXT_BLOCK: &[Field] = &[
    need("text", Shape::Text),
    keep("cache_control", CACHE_CONTROL),
    keep("citations", Shape::Free),
];

const SYSTEM: Shape = Shape::Either(&[Shape::Text, Shape::List(&TEXTS)]);
const TEXTS: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[("text", TEXT_BLOCK)],
    withheld: &[],
});

const BLOCK: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        ("text", TEXT_BLOCK),
        ("image", IMAGE),
        ("document", DOCUMENT),
        ("search_result", SEARCH_RESULT),
        (
            "thinking",
            &[
                need("thinking", Shape::Text),
                keep("signature", Shape::Text),
            ],
        ),
        ("redacted_thinking", &[need("data", Shape::Text)]),
        (
            "tool_use",
            &[
                need("id", Shape::Text),
                need("name", Shape::Text),
                need("input", Shape::Free),
                keep("cache_control", CACHE_CONTROL),
                keep(
                    "caller",
                    Shape::Object(&[need("type", Shape::Is(&["direct"]))]),
                ),
            ],
        ),
        (
            "tool_result",
            &[
                need("tool_use_id", Shape::Text),
                keep(
                    "content",
                    Shape::Either(&[Shape::Text, Shape::List(&RESULT_BLOCK)]),
                ),
                keep("is_error", Shape::Bool),
                keep("cache_control", CACHE_CONTROL),
            ],
        ),
    ],
    withheld: &[],
});

const RESULT_BLOCK: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        ("text", TEXT_BLOCK),
        ("image", IMAGE),
        ("document", DOCUMENT),
        ("search_result", SEARCH_RESULT),
    ],
    withheld: &[],
});

// Sources `url` and `file` are missing on purpose: the provider would read them for the guest.
const IMAGE: &[Field] = &[
    need(
        "source",
        Shape::Union(&Union {
            tag: "type",
            absent: None,
            variants: &[("base64", BASE64_SOURCE)],
            withheld: &[],
        }),
    ),
    keep("cache_control", CACHE_CONTROL),
];
const BASE64_SOURCE: &[Field] = &[need("media_type", Shape::Text), need("data", Shape::Base64)];
const DOCUMENT: &[Field] = &[
    need(
        "source",
        Shape::Union(&Union {
            tag: "type",
            absent: None,
            variants: &[
                ("base64", BASE64_SOURCE),
                (
                    "text",
                    &[need("media_type", Shape::Text), need("data", Shape::Text)],
                ),
                (
                    "content",
                    &[need(
                        "content",
                        Shape::Either(&[Shape::Text, Shape::List(&PLAIN_BLOCK)]),
                    )],
                ),
            ],
            withheld: &[],
        }),
    ),
    keep("title", Shape::Text),
    keep("context", Shape::Text),
    keep("citations", CITATIONS),
    keep("cache_control", CACHE_CONTROL),
];
const PLAIN_BLOCK: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[("text", TEXT_BLOCK), ("image", IMAGE)],
    withheld: &[],
});
// Its `source` is a name that the model cites; nobody fetches it.
const SEARCH_RESULT: &[Field] = &[
    need("source", Shape::Text),
    need("title", Shape::Text),
    need("content", Shape::List(&TEXTS)),
    keep("citations", CITATIONS),
    keep("cache_control", CACHE_CONTROL),
];
const CITATIONS: Shape = Shape::Object(&[keep("enabled", Shape::Bool)]);

const CACHE_CONTROL: Shape = Shape::Object(&[
    need("type", Shape::Is(&["ephemeral"])),
    // An hour in the cache has another price, and the configuration knows one.
    keep("ttl", Shape::Is(&["5m"])),
]);

/// Tools that run in the guest: the provider only knows their schema.
const CLIENT_TOOL: &[Field] = &[
    need("name", Shape::Text),
    keep("cache_control", CACHE_CONTROL),
    keep("max_characters", Shape::Number),
];
const TOOL: Shape = Shape::Union(&Union {
    tag: "type",
    absent: Some("custom"),
    variants: &[
        (
            "custom",
            &[
                need("name", Shape::Text),
                keep("description", Shape::Text),
                need("input_schema", Shape::Free),
                keep("strict", Shape::Bool),
                keep("input_examples", Shape::Free),
                keep("eager_input_streaming", Shape::Bool),
                keep("cache_control", CACHE_CONTROL),
            ],
        ),
        ("bash_*", CLIENT_TOOL),
        ("text_editor_*", CLIENT_TOOL),
        ("memory_*", CLIENT_TOOL),
    ],
    withheld: &[
        "web_search_*",
        "web_fetch_*",
        "code_execution_*",
        "tool_search_*",
        "mcp_toolset*",
        "computer_*",
        "browser_*",
    ],
});

const TOOL_CHOICE: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        ("auto", ONE_AT_A_TIME),
        ("any", ONE_AT_A_TIME),
        ("none", &[]),
        (
            "tool",
            &[
                need("name", Shape::Text),
                keep("disable_parallel_tool_use", Shape::Bool),
            ],
        ),
    ],
    withheld: &[],
});
const ONE_AT_A_TIME: &[Field] = &[keep("disable_parallel_tool_use", Shape::Bool)];

const THINKING: Shape = Shape::Union(&Union {
    tag: "type",
    absent: None,
    variants: &[
        (
            "enabled",
            &[
                need("budget_tokens", Shape::Number),
                keep("display", Shape::Text),
            ],
        ),
        ("adaptive", &[keep("display", Shape::Text)]),
        ("disabled", &[]),
    ],
    withheld: &[],
});

const OUTPUT_CONFIG: Shape = Shape::Object(&[
    keep("effort", Shape::Text),
    keep(
        "format",
        Shape::Object(&[
            need("type", Shape::Is(&["json_schema"])),
            need("schema", Shape::Free),
        ]),
    ),
]);
