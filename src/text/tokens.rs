//! The one rule of what a word is.
//!
//! A *word* is a maximal run of letters, digits, underscores and combining marks, lower-cased; each Han, Hiragana
//! or Katakana character is a word of its own, since those scripts write no spaces. Everything else that is not white
//! space is a *mark*, one token per character. Texts are taken as they are: no Unicode normalisation.

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Space,
    Word,
    Single,
    Mark,
}

fn class(c: char) -> Class {
    if c.is_ascii() {
        return if c.is_ascii_alphanumeric() || c == '_' {
            Class::Word
        } else if c.is_ascii_whitespace() || c.is_ascii_control() {
            Class::Space
        } else {
            Class::Mark
        };
    }
    match c as u32 {
        0x3040..=0x30FF | 0x3400..=0x4DBF | 0x4E00..=0x9FFF | 0xF900..=0xFAFF | 0x2_0000..=0x3_FFFF => {
            Class::Single
        }
        // Combining accents, zero-width joiners, variation selectors and viramas belong to the word around them.
        0x0300..=0x036F | 0x094D | 0x09CD | 0x200C | 0x200D | 0xFE00..=0xFE0F => Class::Word,
        0xFEFF | 0x200B | 0x2060 => Class::Space,
        _ if c.is_alphanumeric() => Class::Word,
        _ if c.is_whitespace() || c.is_control() => Class::Space,
        _ => Class::Mark,
    }
}

fn scan(text: &str, marks: bool, word: &mut String, mut each: impl FnMut(&str)) {
    word.clear();
    for c in text.chars() {
        let class = class(c);
        if class == Class::Word {
            if c.is_ascii() {
                word.push(c.to_ascii_lowercase());
            } else {
                word.extend(c.to_lowercase());
            }
            continue;
        }
        if !word.is_empty() {
            each(word);
            word.clear();
        }
        if class == Class::Single || (marks && class == Class::Mark) {
            word.push(c);
            each(word);
            word.clear();
        }
    }
    if !word.is_empty() {
        each(word);
        word.clear();
    }
}

/// Calls `each` with every word of `text`, in order. `scratch` is reused between calls.
pub fn words(text: &str, scratch: &mut String, each: impl FnMut(&str)) {
    scan(text, false, scratch, each);
}

/// Calls `each` with every word and every mark of `text`, in order. `scratch` is reused between calls.
pub fn tokens(text: &str, scratch: &mut String, each: impl FnMut(&str)) {
    scan(text, true, scratch, each);
}

/// Where the words of `text` stand: (start, end) of each, counted in characters, in order; the marks where it has no words.
/// The n-th span is the n-th word that [`words`] gives.
pub fn spans(text: &str) -> Vec<(u32, u32)> {
    let found = spans_of(text, false);
    if found.is_empty() { spans_of(text, true) } else { found }
}

fn spans_of(text: &str, marks: bool) -> Vec<(u32, u32)> {
    let mut found = Vec::new();
    let mut open = None;
    let mut at = 0u32;
    for c in text.chars() {
        let class = class(c);
        if class == Class::Word {
            open.get_or_insert(at);
        } else {
            found.extend(open.take().map(|start| (start, at)));
            if class == Class::Single || (marks && class == Class::Mark) {
                found.push((at, at + 1));
            }
        }
        at += 1;
    }
    found.extend(open.map(|start| (start, at)));
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn collect(text: &str, marks: bool) -> Vec<String> {
        let mut found = Vec::new();
        scan(text, marks, &mut String::new(), |token| found.push(token.to_owned()));
        found
    }

    #[test]
    fn words_and_marks() {
        assert_eq!(collect("Don't use array_like(X2)!", false), ["don", "t", "use", "array_like", "x2"]);
        assert_eq!(collect("a(B)\t-- c", true), ["a", "(", "b", ")", "-", "-", "c"]);
        assert_eq!(collect("ÉTÉ e\u{301}t", false), ["été", "e\u{301}t"]);
        assert_eq!(collect("日本go", false), ["日", "本", "go"]);
        assert_eq!(collect(" \u{a0}\u{200b}\n\0", true), Vec::<String>::new());
        assert_eq!(collect("", true), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn a_span_holds_its_word(text in ".{0,60}") {
            let mut tokens = collect(&text, false);
            if tokens.is_empty() {
                tokens = collect(&text, true);
            }
            let chars: Vec<char> = text.chars().collect();
            let cut: Vec<String> = spans(&text)
                .into_iter()
                .map(|(start, end)| collect(&chars[start as usize..end as usize].iter().collect::<String>(), true).concat())
                .collect();
            prop_assert_eq!(cut, tokens);
        }

        #[test]
        fn words_are_the_tokens_that_are_no_marks(text in ".{0,60}") {
            let all = collect(&text, true);
            let words = collect(&text, false);
            let kept: Vec<String> = all
                .iter()
                .filter(|token| {
                    let c = token.chars().next().unwrap();
                    matches!(class(c), Class::Word | Class::Single) || token.chars().count() > 1
                })
                .cloned()
                .collect();
            prop_assert_eq!(&words, &kept);
            prop_assert!(all.iter().all(|token| !token.is_empty()));
        }
    }
}
