"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SCREENFUL = 100;
  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const title = {};
  const mark = {};
  for (const option of document.querySelectorAll('#controls [name="region"] option')) {
    if (option.value) [, mark[option.value], title[option.value]] = /^(\S+) (.*)$/s.exec(option.textContent);
  }

  // All tokens that are to be predicted, in the order of the texts. A view is what a model thinks.
  const tokens = [];
  const places = []; // of each text: by place among its tokens, the index in tokens, or -1
  const number = (value) => (value === null ? Infinity : value);
  function viewAt(packed, index, count) {
    const five = packed.words.length / count;
    const likeliest = [];
    for (let i = index * five; i < (index + 1) * five; i++) {
      likeliest.push([data.words[packed.words[i]], packed.chances[i] / 1000]);
    }
    const nll = number(packed.nll[index]);
    return {
      nll,
      p: Math.exp(-nll),
      entropy: packed.normalized[index] * data.ln_k,
      normalized: packed.normalized[index],
      gate: packed.gate[index],
      region: data.regions[Number(packed.region[index])],
      likeliest,
    };
  }
  const articles = [...document.querySelectorAll(".row")];
  const bodies = articles.map((article) => article.querySelector(".text"));
  const whole = bodies.map((text) => text.textContent);
  data.rows.forEach((row, index) => {
    const begins = [0];
    for (const length of row.lengths) begins.push(begins[begins.length - 1] + length);
    places.push(new Array(row.lengths.length).fill(-1));
    row.positions.forEach((position, i) => {
      places[index][position] = tokens.length;
      tokens.push({
        index: tokens.length,
        row: index,
        begin: begins[position],
        end: begins[position + 1],
        first: row.views[0],
        second: row.views[1],
        i,
        count: row.positions.length,
      });
    });
  });
  const viewed = new Map();
  function view(token, which = 0) {
    const packed = which ? token.second : token.first;
    if (!packed.nll.length) return null;
    const key = 2 * token.index + which;
    if (!viewed.has(key)) viewed.set(key, viewAt(packed, token.i, token.count));
    return viewed.get(key);
  }
  const textOf = (token) => whole[token.row].slice(token.begin, token.end);
  const mutedOf = (seen) => (seen.gate === 1 ? 0 : (1 - seen.gate) * seen.nll);
  const muted = (token) => mutedOf(view(token));
  function change(token) {
    const [before, after] = [view(token).nll, view(token, 1).nll];
    return before === after ? 0 : after - before; // both may be infinite
  }
  const three = (value) => (Number.isFinite(value) ? value.toFixed(3) : "\u221e");
  const chance = (p) => (p >= 0.001 || p === 0 ? p.toFixed(3) : p.toExponential(1));
  function visible(text) {
    if (text === "") return "\u00b7";
    if (/^ +$/.test(text)) return "\u2423".repeat(text.length);
    return text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
  }

  // The texts: plain until they come near the screen, then a span for each token.
  const spans = new Map();
  function build(row) {
    const target = bodies[row];
    if (target.dataset.built) return;
    target.dataset.built = "1";
    const parts = document.createDocumentFragment();
    let begin = 0;
    let plain = "";
    data.rows[row].lengths.forEach((length, position) => {
      const text = whole[row].slice(begin, begin + length);
      begin += length;
      const index = places[row][position];
      if (index < 0) {
        plain += text;
        return;
      }
      if (plain) parts.append(plain);
      plain = "";
      const seen = view(tokens[index]);
      const span = element("span", "token", text);
      span.classList.toggle("conflict", seen.region === "conflict");
      span.classList.toggle("break", /^\n+$/.test(text));
      span.dataset.weight = Math.round(10 * Math.min(1, Math.max(0, seen.gate)));
      span.dataset.token = index;
      span.tabIndex = -1;
      span.setAttribute("role", "button");
      spans.set(index, span);
      parts.append(span);
    });
    if (plain) parts.append(plain);
    target.replaceChildren(parts);
    if (row === tokens[current]?.row) spans.get(current).tabIndex = 0;
  }
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) if (entry.isIntersecting) build(Number(entry.target.dataset.index));
    },
    { rootMargin: "1500px" },
  );

  // One token of the texts is in the order of the Tab key; arrows go to the others.
  let current = 0;
  function goTo(index) {
    const token = tokens[Math.min(tokens.length - 1, Math.max(0, index))];
    build(token.row);
    const before = spans.get(current);
    if (before) before.tabIndex = -1;
    current = token.index;
    const span = spans.get(current);
    span.tabIndex = 0;
    return span;
  }

  const card = document.getElementById("card");
  let origin = null; // where the keyboard goes when the card closes
  function likeliestTable(seen, caption) {
    const table = element("table");
    table.append(element("caption", "", caption));
    for (const [word, p] of seen.likeliest) {
      const line = table.insertRow();
      const head = element("th");
      head.append(element("span", "word", visible(word)));
      line.append(head, element("td", "", chance(p)));
    }
    return table;
  }
  function fill(token) {
    const seen = view(token);
    const after = view(token, 1);
    card.replaceChildren();
    const close = element("button", "close", "Close");
    close.type = "button";
    close.addEventListener("click", () => hide(true));
    const heading = element("h4");
    heading.id = "card-title";
    heading.append(element("span", "word", visible(textOf(token))));
    card.append(close, heading);
    const names = data.models;
    const numbers = element("table");
    if (after) {
      const head = numbers.createTHead().insertRow();
      head.append(element("th"), element("td", "", names[0]), element("td", "", names[1]));
    }
    const line = (name, of) => {
      const row = numbers.insertRow();
      row.append(element("th", "", name), element("td", "", of(seen)));
      if (after) row.append(element("td", "", of(after)));
    };
    line("region", (v) => `${mark[v.region]} ${title[v.region]}`);
    line("p(label)", (v) => chance(v.p));
    line("nll, nats", (v) => three(v.nll));
    line("H, nats", (v) => three(v.entropy));
    line("H / ln k", (v) => three(v.normalized));
    line("gate", (v) => three(v.gate));
    line("muted, nats", (v) => three(mutedOf(v)));
    const said = element("div", "beside");
    said.append(likeliestTable(seen, `${names[0]} would have said`));
    if (after) said.append(likeliestTable(after, `${names[1]} would have said`));
    card.append(numbers, said);
  }
  function show(token, beside, pinned, from = beside) {
    document.querySelector(".token.open")?.classList.remove("open");
    fill(token);
    card.hidden = false;
    card.classList.toggle("pinned", pinned);
    beside.classList.add("open");
    const box = (beside.getClientRects()[0]) || beside.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - card.offsetWidth - 16);
    card.style.left = `${window.scrollX + Math.max(8, left)}px`;
    const below = box.bottom + 6;
    const fits = below + card.offsetHeight <= window.innerHeight || box.top < card.offsetHeight + 6;
    card.style.top = `${window.scrollY + (fits ? below : box.top - card.offsetHeight - 6)}px`;
    if (pinned) {
      origin = from;
      card.querySelector(".close").focus({ preventScroll: true });
    }
  }
  function hide(back) {
    if (card.hidden) return;
    card.hidden = true;
    document.querySelector(".token.open")?.classList.remove("open");
    if (back && origin) origin.focus();
    origin = null;
  }

  const rows = document.getElementById("rows");
  const tokenOf = (target) => {
    const span = target instanceof Element ? target.closest("[data-token]") : null;
    return span && [tokens[Number(span.dataset.token)], span];
  };
  rows.addEventListener("click", (event) => {
    const found = tokenOf(event.target);
    if (!found) return;
    goTo(found[0].index);
    show(...found, true);
  });
  rows.addEventListener("mouseover", (event) => {
    const found = tokenOf(event.target);
    if (origin) return;
    if (found) show(...found, false);
    else hide(false);
  });
  rows.addEventListener("mouseleave", () => origin || hide(false));
  rows.addEventListener("keydown", (event) => {
    const found = tokenOf(event.target);
    if (!found) return;
    const [token, span] = found;
    const beside = (step) => {
      // In the order of the screen.
      const all = [...rows.children];
      const article = all[all.indexOf(articles[token.row]) + step];
      return article && places[Number(article.dataset.index)].filter((index) => index >= 0);
    };
    const here = places[token.row].filter((index) => index >= 0);
    const at = here.indexOf(token.index);
    const to = {
      ArrowRight: here[at + 1] ?? beside(1)?.[0],
      ArrowLeft: here[at - 1] ?? beside(-1)?.at(-1),
      ArrowDown: beside(1)?.[0] ?? here.at(-1),
      ArrowUp: beside(-1)?.[0] ?? here[0],
    };
    if (event.key in to) {
      event.preventDefault();
      if (to[event.key] !== undefined) goTo(to[event.key]).focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      show(token, span, true);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide(true);
  });
  card.addEventListener("focusout", (event) => {
    if (event.relatedTarget && !card.contains(event.relatedTarget)) hide(false);
  });
  addEventListener("beforeprint", () => bodies.forEach((_, row) => build(row)));
  document.addEventListener("click", (event) => {
    if (origin && !card.contains(event.target) && !tokenOf(event.target) && !event.target.closest("[data-goto]")) hide(false);
  });

  // The list of tokens.
  const controls = document.getElementById("controls");
  const body = document.querySelector("#list tbody");
  const more = document.getElementById("more");
  const sorts = {
    muted: (token) => -muted(token),
    nll: (token) => -view(token).nll,
    sure: (token) => view(token).normalized,
    gate: (token) => -view(token).gate,
    learned: change,
    lost: (token) => -change(token),
    text: (token) => token.index,
  };
  let listed = [];
  let drawn = 0;
  function cell(line, text, className) {
    const made = line.insertCell();
    made.append(text instanceof Node ? text : element("bdi", "", text));
    if (className) made.className = className;
  }
  function draw() {
    const parts = document.createDocumentFragment();
    for (const token of listed.slice(drawn, drawn + SCREENFUL)) {
      const seen = view(token);
      const line = element("tr");
      cell(line, visible(whole[token.row].slice(Math.max(0, token.begin - 60), token.begin)), "before");
      const button = element("button", "link");
      button.type = "button";
      button.dataset.goto = token.index;
      button.append(element("span", "word", visible(textOf(token))));
      cell(line, button);
      cell(line, chance(seen.p));
      cell(line, element("span", "word", visible(seen.likeliest[0][0])));
      cell(line, chance(seen.likeliest[0][1]));
      cell(line, three(seen.normalized));
      cell(line, three(seen.gate));
      const after = view(token, 1);
      if (after) cell(line, `${three(seen.nll)} \u2192 ${three(after.nll)}`);
      const region = element("span");
      region.append(element("span", `sign region-${seen.region}`, mark[seen.region]), ` ${title[seen.region]}`);
      cell(line, region);
      parts.append(line);
    }
    body.append(parts);
    drawn = Math.min(listed.length, drawn + SCREENFUL);
    more.hidden = drawn >= listed.length;
    document.getElementById("found").textContent = `${listed.length} tokens, ${drawn} shown`;
  }
  function list() {
    const region = controls.elements.region.value;
    const after = controls.elements.after ? controls.elements.after.value : "";
    const word = controls.elements.word.value.toLowerCase();
    const key = sorts[controls.elements.sort.value];
    listed = tokens.filter(
      (token) =>
        (!region || view(token).region === region) &&
        (!after || view(token, 1).region === after) &&
        (!word || textOf(token).toLowerCase().includes(word)),
    );
    const keys = new Map(listed.map((token) => [token, key(token)]));
    // The order of the text where keys are equal.
    listed.sort((a, b) => (keys.get(a) < keys.get(b) ? -1 : keys.get(a) > keys.get(b) ? 1 : a.index - b.index));
    drawn = 0;
    body.replaceChildren();
    draw();
  }
  controls.addEventListener("input", list);
  controls.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", draw);
  body.addEventListener("click", (event) => {
    const button = event.target.closest("[data-goto]");
    if (!button) return;
    const span = goTo(Number(button.dataset.goto));
    span.scrollIntoView({ block: "center", behavior: "instant" });
    show(tokens[current], span, true, button);
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-filter]");
    if (!button) return;
    controls.elements.region.value = button.dataset.filter;
    if (controls.elements.after) controls.elements.after.value = button.dataset.after || "";
    list();
    document.getElementById("tokens").scrollIntoView();
    controls.elements.region.focus({ preventScroll: true });
  });
  document.getElementById("order").addEventListener("change", (event) => {
    const by = event.target.value;
    const keys = {
      text: (article) => Number(article.dataset.index),
      rank: (article) => Number(article.dataset.rank),
      conflicts: (article) => -Number(article.dataset.conflicts),
    };
    const key = keys[by];
    rows.append(...[...articles].sort((a, b) => key(a) - key(b) || a.dataset.index - b.dataset.index));
  });

  list();
  articles.forEach((article) => near.observe(article));
  if (tokens.length) goTo(0);
})();
