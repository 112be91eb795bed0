-- The regions and models we open with (PRD/requirements.md). Prices are 10⁻¹⁰ USD a token: $0.05 per 1M tokens is 500.

INSERT INTO regions (name, title, multiplier_bp, aliases, fallback, position) VALUES
    ('in-mumbai', 'Mumbai, India', 7000, '{ap-south-1}', '{ap-southeast,eu-west,us-east}', 1),
    ('us-east', 'Virginia, USA', 10000, '{us-east-1}', '{eu-west}', 2),
    ('eu-west', 'Frankfurt, Germany', 11000, '{eu-central-1}', '{us-east,ap-southeast}', 3),
    ('ap-southeast', 'Singapore', 9000, '{ap-southeast-1}', '{in-mumbai,us-east}', 4);

INSERT INTO models (name, family, kind, context_tokens, vram_gb, input_price_e10, output_price_e10, aliases) VALUES
    ('llama-3-8b', 'Llama', 'chat', 8192, 16, 500, 500, '{llama-7b}'),
    ('llama-3-70b', 'Llama', 'chat', 8192, 80, 6000, 6000, '{}'),
    ('mistral-7b', 'Mistral', 'chat', 32768, 16, 400, 400, '{}'),
    ('qwen-2.5-7b', 'Qwen', 'chat', 32768, 16, 400, 400, '{}'),
    ('gemma-7b', 'Gemma', 'chat', 8192, 16, 300, 300, '{}'),
    ('bge-base-en', 'BGE', 'embedding', 512, 2, 100, NULL, '{}');
